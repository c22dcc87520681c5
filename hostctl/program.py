"""hostctl as it is shipped: its modules joined into the text of one program.

A host gets one file that runs with nothing beside it and reads from top to bottom. The names of all
modules share that file, so each is defined once, private ones too.
"""

import base64
import bz2
import re
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
# In the order in which they need each other.
MODULES = (
    "protocol",
    "machine",
    "spec",
    "tools",
    "record",
    "moved",
    "cluster",
    "live",
    "waiting",
    "cluster_backup",
    "swap",
    "files",
    "certificates",
    "preflight",
    "images",
    "k3d",
    "move",
    "install",
    "workloads",
    "owners",
    "connectors",
    "existing",
    "storage",
    "argocd",
    "clean",
    "k3s_node",
    "k3s_service",
    "k3s_datastore",
    "running",
    "acceptance",
    "postgres",
    "restic",
    "backups",
    "restore",
    "watch",
    "units",
    "k3s_members",
    "k3s",
    "k3s_snapshots",
    "cli",
)
# Python keeps the bytecode of a module beside it, and compiles a script anew at each start, which
# takes longer than what most verbs do. -I: what lies in the caller's directory is none of it.
_START = """\
#!/bin/sh
""\":"
exec python3 -ISc 'import sys
from importlib import machinery, util
sys.argv.pop(0)
loader = machinery.SourceFileLoader("hostctl", sys.argv[0])
hostctl = util.module_from_spec(util.spec_from_loader("hostctl", loader))
loader.exec_module(hostctl)
sys.exit(hostctl.main())' "$0" "$@"
""\"
"""
# Before anything that an older Python does not know; what is above it, it does.
_GUARD = """
if sys.version_info < (3, 9):
    _FOUND = "%d.%d at %s" % (sys.version_info[0], sys.version_info[1], sys.executable)
    _ERROR = {
        "step": "python3 version",
        "cause": _FOUND + " is too old",
        "remedy": "install python3 3.9 or newer. NixOS: environment.systemPackages = "
        "[ pkgs.python3 ]; TrueNAS SCALE: update it. Debian/Ubuntu: apt install python3",
        "code": "tool",
    }
    print(json.dumps({"ok": False, "error": _ERROR}))
    sys.exit(0 if "--exit-zero" in sys.argv else 6)

"""
_HEAD = re.compile(
    r'"""(?P<title>.*?)"""\n(?P<imports>(?:\n|(?:import|from) [^\n(]*\n|from [^\n(]*\([^)]*\)\n)*)',
    re.DOTALL,
)
_OWN = re.compile(r"from hostctl\.\w+ import (?:\([^)]*\)|[^\n(]*)\n")
_STANDARD = re.compile(r"(?:import|from) [^\n(]*\n")


@cache
def text() -> str:
    """The program, an executable for sh and python3, and what the host is given to run."""
    introduction = (_HERE / "__init__.py").read_text(encoding="utf-8")
    imports: set[str] = set()
    parts = []
    for module in MODULES:
        source = (_HERE / f"{module}.py").read_text(encoding="utf-8")
        head = _HEAD.match(source)
        if not head:
            raise ValueError(f"hostctl/{module}.py begins with no docstring and imports")
        imports.update(_STANDARD.findall(_OWN.sub("", head["imports"])))
        parts.append(f"# {head['title']}\n\n{source[head.end() :].strip()}\n")
    imports.discard("from __future__ import annotations\n")
    return "\n\n".join(
        [
            f"{_START}\nfrom __future__ import annotations\n\n__doc__ = {introduction}\n"
            + "".join(sorted(imports, key=lambda line: (line.startswith("from"), line)))
            + _GUARD,
            *parts,
            'if __name__ == "__main__":\n    sys.exit(main())\n',
        ]
    )


@cache
def packed() -> str:
    """:func:`text` as it travels, and as a state keeps it: bzip2, in base64.

    The engine copies and writes a resource's inputs many times in a preview. Of the standard
    library's compressors bzip2 has one encoder, whose output is the same for every operator; those
    of zlib and lzma differ by build.
    """
    return base64.b64encode(bz2.compress(text().encode())).decode()


if __name__ == "__main__":
    print(text(), end="")
