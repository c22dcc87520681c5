"""Where the stand-ins act for real: the Docker engine and the API server that the program names.

Imported only with HOMELAB_REHEARSAL_RUN=1, since its libraries cost what a rehearsal need not pay.
"""
