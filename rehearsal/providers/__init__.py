"""The stand-in providers, one module each, all on :mod:`rehearsal.core`.

`rehearsal/plugins/pulumi-resource-<package>` runs `python -m rehearsal.providers.<package>`.
Where a stand-in differs from the official plugin on purpose, `rehearsal/DIFFERENCES.md` says so.
"""
