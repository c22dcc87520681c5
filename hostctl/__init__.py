"""hostctl: what a host does for its stack, one idempotent verb at a time.

A verb takes a JSON spec (stdin, ``--spec FILE``, or from the host's own record when a cluster is
NAMEd), prints one JSON result on stdout and what it is doing on stderr. Exit codes: 0 done, 2 bad
spec or usage, 3 refused, 4 cannot tell, 5 a step failed, 6 a tool is missing or too old, 7 timed
out.

Rules that hold everywhere; numbers are the incidents that they come from:

* Three answers: present, absent, cannot tell. Nothing is created or deleted on the third (3).
* Recovery starts, restarts and waits; it never deletes and it is bounded (1, 2, 4).
* A failure names the step, the cause in the lower layer's words, and the remedy (17).
* A secret value is never an argument of a process, in progress or in an error.

Standard library only, Python 3.9 and newer. It is shipped and installed as one file, which
`hostctl/program.py` joins from these modules.
"""
