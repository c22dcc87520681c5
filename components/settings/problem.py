"""A setting that is refused, and how it is told."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pulumi

Path = tuple[str | int, ...]
"""Keys and list indexes after `homelab:`, such as ``("cluster", "ports", 0, "hostPort")``."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,119}")
_USERINFO = re.compile(r"//[^/@\s]*@")
_LONGEST = 120


class _Hidden:
    def __repr__(self) -> str:
        return "HIDDEN"


HIDDEN = _Hidden()
"""In place of a value that must not be shown."""


@dataclass(frozen=True)
class Problem:
    """One refused setting.

    ``value`` is None where the key itself is at fault. ``verdict`` follows the value in the
    sentence. ``involves`` are the other settings that a rule looked at: where one of them is
    refused itself, this problem may only be its consequence and is left out.
    """

    path: Path
    value: Any
    allowed: str
    remedy: str
    verdict: str = "is not allowed"
    involves: Sequence[Path] = ()

    def __str__(self) -> str:
        if self.value is HIDDEN:
            subject = "the value (not shown) "
        else:
            subject = "" if self.value is None else f"{shown(self.value)} "
        return (
            f"{key_path(self.path)}: {subject}{self.verdict}."
            f" Allowed: {self.allowed}. Remedy: {self.remedy}."
        )


class SettingsError(pulumi.RunError):
    """A stack file that cannot be used. Its text is all problems, a line each, and no secret.

    ``visible`` says of a path and its value whether the value may be shown; without it all may.
    """

    def __init__(
        self,
        source: str,
        problems: Sequence[Problem],
        visible: Callable[[Path, Any], bool] | None = None,
    ) -> None:
        self.source = source
        self.problems = tuple(
            problem
            if problem.value is None or not visible or visible(problem.path, problem.value)
            else replace(problem, value=HIDDEN, involves=())
            for problem in problems
        )
        count = "1 setting is" if len(problems) == 1 else f"{len(problems)} settings are"
        super().__init__(
            "\n".join(
                [f"{source}: {count} refused; nothing was changed.", *map(str, self.problems)]
            )
        )


def key_path(path: Path) -> str:
    """As `pulumi config set --path` takes it: ``homelab:cloudflare.zones["example.org"]``."""
    text = "homelab:"
    for index, part in enumerate(path):
        if isinstance(part, str) and _IDENTIFIER.fullmatch(part):
            text += f".{part}" if index else part
        else:
            text += f"[{shown(part)}]"
    return text


def shown(value: Any) -> str:
    """A value for an error: one line of ASCII, bounded in length, no credentials of a URL."""
    if not isinstance(value, str | int | float | bool):
        return "the value"
    text = value if isinstance(value, str) else json.dumps(value)
    text = _USERINFO.sub("//***@", text)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    return json.dumps(text) if isinstance(value, str) else text
