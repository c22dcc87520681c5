"""All errors of a stack file at once: of fields, and of the rules between those that are right."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from components.settings.model import Rule, Text
from components.settings.problem import HIDDEN, Path, Problem, SettingsError, key_path

# A pass mends one level of a stack file, and no setting is nested deeper.
_PASSES = 12


class Checked(Protocol):
    """A model with rules between its fields."""

    def problems(self) -> Iterator[Problem]: ...


S = TypeVar("S", bound=Checked)


def validated(
    model: type[S], data: Any, build: Callable[[Any], S], context: Mapping[str, Any]
) -> S:
    """Builds the settings, or raises SettingsError with every problem.

    Context: ``source`` names the stack file; ``visible`` says of a path and its value whether the
    value may be shown. With a list ``left_out`` the settings are built of what is right wherever
    that is enough, for a reader who has no passphrase: problems go into the list, save those of
    encrypted values.
    """
    try:
        settings: S | None = build(data)
        problems, refused = [], set[Path]()
    except ValidationError as error:
        details = _details(error)
        problems = [
            _problem(model, detail)
            for detail in details
            if "left_out" not in context or not _is_of_a_secret(model, detail)
        ]
        # The rules between the fields that are right are checked all the same.
        mended = _Mended(model, data)
        settings, refused = mended.build(build, details), mended.paths
    if settings is not None:
        above = {path[:length] for path in refused for length in range(len(path))}
        problems += [
            problem
            for problem in settings.problems()
            if not any(
                path in above or any(path[:length] in refused for length in range(len(path) + 1))
                for path in (problem.path, *problem.involves)
            )
        ]
    if settings is not None and "left_out" in context:
        context["left_out"].extend(problems)
        return settings
    if settings is not None and not problems:
        return settings
    order = {section: index for index, section in enumerate(_Node(model).keys())}
    problems.sort(key=lambda problem: order.get(str(problem.path[0]), -1) if problem.path else -1)
    # Outside the handler above, so that no trace leads back to pydantic's error and its input.
    raise SettingsError(context.get("source", "settings"), problems, context.get("visible"))


def _details(error: ValidationError) -> list[ErrorDetails]:
    # A default made from other fields is not made when those are refused: no error of its own.
    return [
        detail
        for detail in error.errors(include_url=False)
        if detail["type"] != "default_factory_not_called"
    ]


@dataclass(frozen=True)
class _Node:
    """A place in the model: its type without Optional and Annotated, its rule, its field."""

    type: Any
    rule: Rule | None = None
    field: FieldInfo | None = None

    @classmethod
    def of(
        cls, annotation: Any, metadata: Sequence[Any] = (), field: FieldInfo | None = None
    ) -> "_Node":
        found = list(metadata)
        while True:
            origin = get_origin(annotation)
            if origin is Annotated:
                annotation, *more = get_args(annotation)
                found += more
            elif origin in (Union, UnionType):
                members = [member for member in get_args(annotation) if member is not type(None)]
                if len(members) > 1:
                    break
                annotation = members[0]
            else:
                break
        rule = next((item for item in found if isinstance(item, Rule)), None)
        return cls(annotation, rule, field)

    def child(self, key: str | int) -> "_Node | None":
        """The place under ``key``, which for a choice of models is the tag in pydantic's path."""
        origin, arguments = get_origin(self.type), get_args(self.type)
        if origin is dict and len(arguments) == 2:
            return _Node.of(arguments[1])
        if origin is list and arguments:
            return _Node.of(arguments[0])
        if self.is_choice:
            return next(
                (
                    _Node(member)
                    for member in arguments
                    if key in get_args(member.model_fields["kind"].annotation)
                ),
                None,
            )
        if self.is_model:
            for name, field in self.type.model_fields.items():
                if key in (field.alias or name, name):
                    return _Node.of(field.annotation, field.metadata, field)
        return None

    @property
    def is_choice(self) -> bool:
        """One of several models, told apart by `kind`."""
        return get_origin(self.type) in (Union, UnionType)

    @property
    def is_model(self) -> bool:
        return isinstance(self.type, type) and issubclass(self.type, BaseModel)

    @property
    def shows_value(self) -> bool:
        """A leaf that is no secret. What was put where a mapping belongs may be one."""
        if isinstance(self.rule, Text) and not self.rule.shown:
            return False
        return self.type in (str, int, bool) or get_origin(self.type) is Literal

    @property
    def is_secret(self) -> bool:
        return self.type is SecretStr

    def keys(self) -> list[str]:
        return [field.alias or name for name, field in self.type.model_fields.items()]

    def allowed(self) -> str:
        if self.rule is not None:
            return self.rule.allowed
        origin, arguments = get_origin(self.type), get_args(self.type)
        if self.type is bool:
            return "true or false, without quotes"
        if origin is Literal:
            return " or ".join(map(str, arguments))
        if origin is list:
            return f"a list of: {_Node.of(arguments[0]).allowed()}"
        if origin is dict:
            return "a mapping by name"
        if self.is_choice:
            kinds = [
                kind
                for member in arguments
                for kind in get_args(member.model_fields["kind"].annotation)
            ]
            return f"a mapping with kind {' or '.join(kinds)}"
        if self.is_model:
            return f"a mapping with the keys {', '.join(self.keys())}"
        return "text"

    def remedy(self, path: Path) -> str:
        """How to set the place at ``path``."""
        if self.is_model or self.is_choice or get_origin(self.type) in (dict, list):
            return "write it with its keys or entries indented under it, as docs/settings.md does"
        flag = "--secret " if self.is_secret else ""
        # A key is what someone wrote; this is pasted into a shell.
        quoted = key_path(path).replace("'", "'\\''")
        # Of a secret it asks.
        value = "" if self.is_secret else " VALUE"
        command = f"pulumi config set {flag}--path '{quoted}'{value}"
        return f"{command}; {self.rule.remedy}" if self.rule else command

    def example(self) -> Any:
        """A value that this place takes; a mapping is empty and filled on the next pass."""
        if self.rule is not None:
            return self.rule.example
        origin, arguments = get_origin(self.type), get_args(self.type)
        if origin is Literal:
            return arguments[0]
        if origin is list:
            return []
        if self.is_choice:
            # The last kind needs least: the others are checked where they are written.
            return {"kind": get_args(arguments[-1].model_fields["kind"].annotation)[0]}
        return False if self.type is bool else {}


def _locate(model: Any, location: Sequence[str | int]) -> tuple[Path, list[_Node | None]]:
    """Path in the stack file of an error's location, and the nodes from the root to it."""
    node: _Node | None = _Node(model)
    path: list[str | int] = []
    nodes: list[_Node | None] = [node]
    for part in location:
        if part == "[key]":
            # The key before it is refused, not what it holds.
            break
        choice = node is not None and node.is_choice
        node = node.child(part) if node is not None else None
        if choice:
            nodes[-1] = node
            continue
        path.append(part)
        nodes.append(node)
    return tuple(path), nodes


def _is_of_a_secret(model: Any, detail: ErrorDetails) -> bool:
    node = _locate(model, detail["loc"])[1][-1]
    return node is not None and node.is_secret


def _problem(model: Any, detail: ErrorDetails) -> Problem:
    """One of pydantic's errors in the words of a stack file."""
    path, nodes = _locate(model, detail["loc"])
    node = nodes[-1]
    context = detail.get("ctx", {})
    if not path:
        return Problem(path, HIDDEN, _Node(model).allowed(), "write the settings of the stack")
    if detail["type"] == "extra_forbidden":
        return _unknown_key(path, nodes[-2])
    if detail["loc"][-1] == "[key]":
        return Problem(
            path,
            None,
            str(context.get("allowed", "text")),
            str(context.get("remedy", "rename it")),
            "has a name that is not allowed",
        )
    if node is None:
        return Problem(path, HIDDEN, detail["msg"], "correct it")
    if detail["type"] == "missing":
        return Problem(path, None, node.allowed(), node.remedy(path), "is missing")
    if detail["input"] is None:
        return Problem(path, None, node.allowed(), node.remedy(path), "is empty")
    remedy = node.rule.remedy if node.rule and not node.is_secret else node.remedy(path)
    if detail["type"] == "string_type":
        remedy += "; text that looks like a number or a date needs quotes"
    shows = node.shows_value and isinstance(detail["input"], str | int | float)
    return Problem(path, detail["input"] if shows else HIDDEN, node.allowed(), remedy)


def _unknown_key(path: Path, parent: _Node | None) -> Problem:
    known = parent.keys() if parent is not None and parent.is_model else []
    near = difflib.get_close_matches(str(path[-1])[:64], known, n=1)
    remedy = f"write {near[0]}" if near else "remove it"
    return Problem(path, None, ", ".join(known), remedy, "is not a setting")


class _Mended:
    """A copy of the stack file's data in which what is refused is left out, or replaced by an
    example where it is required.

    Positions stay as they are, so that the paths of further problems are right. ``paths`` are the
    places touched.
    """

    def __init__(self, model: Any, data: Any) -> None:
        self._model = model
        self._data = deepcopy(data) if isinstance(data, dict) else {}
        self.paths: set[Path] = set()

    def build(self, build: Callable[[Any], S], details: list[ErrorDetails]) -> S | None:
        """The settings from what is right, or None where too little is."""
        for _ in range(_PASSES):
            for detail in details:
                path, nodes = _locate(self._model, detail["loc"])
                if not path or not self._mend(path, nodes, detail):
                    return None
                self.paths.add(path)
            try:
                return build(self._data)
            except ValidationError as error:
                details = _details(error)
        return None

    def _mend(self, path: Path, nodes: list[_Node | None], detail: ErrorDetails) -> bool:
        container: Any = self._data
        for key in path[:-1]:
            try:
                container = container[key]
            except (KeyError, IndexError, TypeError):
                return False
        key, node = path[-1], nodes[-1]
        if isinstance(container, list) and isinstance(key, int) and node is not None:
            container[key] = node.example()
        elif isinstance(container, dict):
            container.pop(key, None)
            leave_out = detail["type"] == "extra_forbidden" or detail["loc"][-1] == "[key]"
            required = node is not None and (node.field is None or node.field.is_required())
            if not leave_out and required and node is not None:
                container[key] = node.example()
        else:
            return False
        return True
