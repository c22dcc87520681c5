"""`python -m diagram [STACK]`: draws the stacks of the project, or says which is not current."""

import argparse
import sys
from pathlib import Path

from components import settings
from diagram.platform import picture

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m diagram", description=__doc__)
    parser.add_argument("stack", nargs="?", help="all where left out")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    files = settings.stack_files(ROOT)
    if options.stack:
        files = [ROOT / f"Pulumi.{options.stack}.yaml"]
    stale = []
    for file in files:
        try:
            stack, _ = settings.read_file(file)
        except (settings.SettingsError, OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        name = file.name.split(".")[1]
        path = ROOT / "docs" / "diagrams" / f"{name}.svg"
        drawn = picture(name, stack).svg()
        if path.exists() and path.read_text(encoding="utf-8") == drawn:
            continue
        if options.check:
            stale.append(f"{path.relative_to(ROOT)} is not current: make diagram STACK={name}")
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text(drawn, encoding="utf-8")
        print(path.relative_to(ROOT))
    for line in stale:
        print(line, file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
