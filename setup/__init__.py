"""Sets up what the project needs: uv, Pulumi's engine and language host, the Python packages.

Standard library only: it runs before anything is installed.
"""
