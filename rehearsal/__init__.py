"""Rehearsals: a stack run by the real Pulumi engine against stand-ins for its providers.

A rehearsal is marked by the environment variable HOMELAB_REHEARSAL, which names its directory.
Every stand-in refuses to start without it.
"""
