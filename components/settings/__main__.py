"""`python -m components.settings`: whether the stacks of the project can live side by side."""

import sys
from itertools import combinations
from pathlib import Path

from components.settings.fleet import Stack, collisions, stack_files, strays


def main(directory: Path) -> int:
    """Compares each stack file with each; returns the exit code. A file that cannot be understood
    is named too, and what can be of it is compared.
    """
    fleet = [Stack.read(file) for file in stack_files(directory)]
    refused = [f"{stack.file}: {problem}" for stack in fleet for problem in stack.problems]
    refused += [
        f"{stack.file}: {problem}"
        for stack, other in combinations(fleet, 2)
        for problem in collisions(stack, other)
    ]
    refused += [f"{stack.file}: {problem}" for stack in fleet for problem in strays(stack, fleet)]
    for line in refused:
        print(line, file=sys.stderr)
    claims = sum(len(stack.claims) for stack in fleet)
    print(
        f"{len(fleet)} stack file(s) compared, {claims} addresses, ports and names:"
        f" {len(refused)} refused"
    )
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parents[2]))
