"""The program that runs on a host. `hostctl.py` is shipped alone; see README.md for its protocol."""
