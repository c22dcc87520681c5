"""The inputs that the official plugins accept, for the resource types and functions in use.

`<package>.json` is in the terms of Pulumi's package schema, as far as checking inputs needs it. It
is derived from the classes of the installed SDK by `python -m rehearsal.schemas`; a test checks
that it is current. Reading it costs a stand-in a millisecond, importing the SDK seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rehearsal.core import UNKNOWN, Properties, property_path, reveal

DIRECTORY = Path(__file__).parent

_SCALARS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One input that the plugin does not accept. `detail` is the type expected, for kind `type`."""

    kind: Literal["missing", "unknown", "type"]
    path: str
    detail: str = ""
    value: Any = None


class Schema:
    """The schema of one package."""

    def __init__(self, package: str) -> None:
        schema = json.loads((DIRECTORY / f"{package}.json").read_text())
        self.version: str = schema["version"]
        self.provider: Properties = schema["provider"]
        self.resources: dict[str, Properties] = schema["resources"]
        self.functions: dict[str, Properties] = schema["functions"]
        self.types: dict[str, Properties] = schema["types"]

    def inputs(self, token: str) -> dict[str, Properties]:
        """The input properties of a resource type, by name."""
        return self.resources[token]["inputProperties"]

    def outputs(self, token: str) -> list[str]:
        """The names of a resource type's output properties, which include its inputs."""
        return self.resources[token]["outputs"]

    def check_resource(self, token: str, inputs: Properties) -> list[Problem]:
        """What is wrong with the inputs of a resource."""
        spec = self.resources[token]
        return list(self._object(spec["inputProperties"], spec["requiredInputs"], inputs, ""))

    def check_function(self, token: str, args: Properties) -> list[Problem]:
        """What is wrong with the arguments of a function."""
        spec = self.functions[token]["inputs"]
        return list(self._object(spec["properties"], spec["required"], args, ""))

    def _object(
        self, specs: dict[str, Properties], required: list[str], value: Properties, path: str
    ) -> Iterator[Problem]:
        for name in required:
            if reveal(value.get(name)) is None:
                yield Problem("missing", property_path(path, name))
        for name, item in value.items():
            spec = specs.get(name)
            if spec is not None:
                yield from self._value(spec, item, property_path(path, name))
            elif not name.startswith("__"):
                yield Problem("unknown", property_path(path, name))

    def _value(self, spec: Properties, value: Any, path: str) -> Iterator[Problem]:
        value = reveal(value)
        if value is UNKNOWN or value is None:
            return
        if "$ref" in spec:
            if not isinstance(value, dict):
                yield Problem("type", path, "object", value)
                return
            named = self.types[spec["$ref"].removeprefix("#/types/")]
            yield from self._object(named["properties"], named["required"], value, path)
            return
        if "enum" in spec:
            if value not in spec["enum"]:
                yield Problem("type", path, " or ".join(map(repr, spec["enum"])), value)
            return
        kind = spec.get("type")
        if kind == "array":
            if not isinstance(value, list):
                yield Problem("type", path, "array", value)
                return
            for index, item in enumerate(value):
                yield from self._value(spec["items"], item, property_path(path, index))
        elif kind == "object":
            if not isinstance(value, dict):
                yield Problem("type", path, "object", value)
                return
            for name, item in value.items():
                yield from self._value(
                    spec["additionalProperties"], item, property_path(path, name)
                )
        elif kind in _SCALARS and not (
            isinstance(value, _SCALARS[kind]) and (kind == "boolean") == isinstance(value, bool)
        ):
            yield Problem("type", path, kind, value)
