"""A shell on a host with a Docker engine of its own and the stand-in's image: see README.md."""

import os
import subprocess
import sys

from setup import cluster
from tests.cluster.engine import engine

with engine(cluster.resolve()) as one:
    print("Everything here is gone when this shell ends.", file=sys.stderr)
    enter = ["nsenter", f"--target={one.init}", "--mount", "--net", "--pid", "--"]
    command = sys.argv[1:] or [os.environ.get("SHELL", "sh")]
    code = subprocess.run([*enter, *command], env=one.environment).returncode
sys.exit(code)
