"""The program that runs on a host: `hostctl.py`, shipped alone. README.md has its protocol."""
