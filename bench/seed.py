"""A stack of any size without the wait for its first `up`.

The engine writes its whole checkpoint after each step, so a first `up` costs the square of its
steps. Here one added Secret and route are brought up for real; what they left in the state and in
the stand-ins' world is repeated under other names, and imported. That this is what an `up` would
have left is for the caller to see: a preview of it shows no change.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.larger import name
from rehearsal.run import Rehearsal

PROGRAM = Path(__file__).parent / "many"
MARK = name(1)


def first_up(directory: Path, config: Mapping[str, Any], count: int) -> Rehearsal:
    """A stack with that many Secrets and routes added, not brought up yet."""
    return Rehearsal(directory, "many", {**config, "bench:count": count}, program=PROGRAM)


def seeded(directory: Path, one: Rehearsal, count: int) -> Rehearsal:
    """The stack `one`, brought up with one Secret and route added, as it would be with `count`."""
    shutil.copytree(one.directory, directory)
    state = json.loads(one.pulumi("stack", "export", "--show-secrets").stdout)
    resources = state["deployment"]["resources"]
    ids = [r["id"] for r in resources if MARK in r["urn"] and MARK not in r["id"]]
    repeat = Repeat(count, ids)
    rehearsal = first_up(directory, one.config or {}, count)
    rehearsal.import_(repeat.inside(state))
    world = directory / "world"
    for file in [path for path in world.rglob("*") if path.is_file()]:
        _repeat_file(repeat, world, file)
    return rehearsal


@dataclass(frozen=True)
class Repeat:
    """Repeats what is named `bench-00001` under the names up to that of `count`.

    ids: texts that stand for it too, such as a record's id; each copy gets its own.
    """

    count: int
    ids: Iterable[str] = ()

    def of(self, text: str) -> list[str]:
        """The text once for each."""
        return [self._copy(text, number) for number in range(1, self.count + 1)]

    def inside(self, node: Any) -> Any:
        """A JSON value in which whatever is about the one stands once for each.

        An item of a list is, if it is a text that has its name or a mapping with such a text; an
        entry of a mapping is by its key. Texts that hold JSON are gone into.
        """
        if isinstance(node, str):
            return self._inside_text(node)
        if isinstance(node, dict):
            repeated: dict[str, Any] = {}
            for key, value in node.items():
                repeated |= self._copies({key: value}) if MARK in key else {key: self.inside(value)}
            return repeated
        if isinstance(node, list):
            return [
                copy
                for item in node
                for copy in (self._all(item) if _is_the_one(item) else [self.inside(item)])
            ]
        return node

    def _copies(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {key: value for copy in self._all(entry) for key, value in copy.items()}

    def _all(self, item: Any) -> list[Any]:
        return [json.loads(copy) for copy in self.of(json.dumps(item))]

    def _inside_text(self, text: str) -> str:
        held = _held(text)
        return text if held is None else json.dumps(self.inside(held))

    def _copy(self, text: str, number: int) -> str:
        if number == 1:
            return text
        for id in self.ids:
            own = hashlib.sha256(f"{id} {number}".encode()).hexdigest()[: len(id)]
            text = text.replace(id, own)
        return text.replace(MARK, name(number))


def _held(text: str) -> Any:
    """The JSON value that a text with the name holds; None if it is a text like any other."""
    if MARK not in text or text[:1] not in '{["':
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def _is_the_one(item: Any) -> bool:
    texts = item.values() if isinstance(item, dict) else [item]
    return any(isinstance(t, str) and MARK in t and _held(t) is None for t in texts)


def _repeat_file(repeat: Repeat, world: Path, file: Path) -> None:
    """An object of the world that is the one, once for each; another, with what it says of it."""
    path, text = str(file.relative_to(world)), file.read_text()
    if MARK in path or any(id in path for id in repeat.ids):
        for copy, content in zip(repeat.of(path), repeat.of(text), strict=True):
            (world / copy).parent.mkdir(parents=True, exist_ok=True)
            (world / copy).write_text(content)
    elif MARK in text and file.suffix == ".json":
        file.write_text(json.dumps(repeat.inside(json.loads(text))))
