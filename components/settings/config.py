"""Reads the settings of the current stack: the only place that looks at Pulumi's configuration."""

import json
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import pulumi
import yaml
from pulumi.runtime.config import CONFIG, get_config_env, is_config_secret

from components.settings.fleet import NAMESPACE, Stack, collisions, stack_files, strays
from components.settings.problem import Path, SettingsError
from components.settings.stack import Settings


def load(project: FilePath | None = None) -> Settings:
    """The settings of the current stack that are in force. Raises SettingsError with all that is
    wrong in them, or with all that does not go with the other stacks of the project.

    project: the directory of the stack files, for a program that the engine did not find in one.

    The engine hands over every key of the stack file, with the defaults of Pulumi.yaml and
    encrypted values decrypted. Keys of other namespaces are the providers' and not ours.
    """
    name = f"Pulumi.{pulumi.get_stack()}.yaml"
    config = {
        key.removeprefix(NAMESPACE): _parsed(value)
        for key, value in {**get_config_env(), **CONFIG.get()}.items()
        if key.startswith(NAMESPACE)
    }
    project = project or FilePath(pulumi.runtime.get_root_directory() or ".")
    stack_file = _StackFile(project / name)
    settings = Settings.model_validate(
        config,
        by_alias=True,
        by_name=False,
        context={"source": name, "visible": stack_file.shows},
    )
    stack = Stack.of(pulumi.get_stack(), settings)
    others = [Stack.read(file) for file in stack_files(project) if file.name != name]
    for other in others:
        for problem in other.problems:
            pulumi.log.warn(f"{other.file} is compared without this: {problem}")
    wrong = [problem for other in others for problem in collisions(stack, other)]
    wrong += strays(stack, others)
    if wrong:
        raise SettingsError(name, wrong, stack_file.shows)
    return settings.in_force


def _parsed(value: Any) -> Any:
    # Mappings and lists come as JSON text, all else as plain text.
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


class _StackFile:
    """The stack file as text on disk: read only when an error has to be told."""

    def __init__(self, path: FilePath) -> None:
        self._path = path

    def shows(self, path: Path, value: Any) -> bool:
        """Whether a value is no secret, even where its neighbours are or a person encrypted what
        need not be.

        The engine marks a whole `homelab:<key>` as secret when anything in it is encrypted. What
        then stands in the file in the clear, at this very place, is none.
        """
        if not path or not is_config_secret(f"{NAMESPACE}{path[0]}"):
            return True
        node: Any = self._config.get(f"{NAMESPACE}{path[0]}")
        for key in path[1:]:
            try:
                node = node[key]
            except (KeyError, IndexError, TypeError):
                return False
        return type(node) is type(value) and node == value

    @cached_property
    def _config(self) -> dict[str, Any]:
        try:
            return yaml.safe_load(self._path.read_text(encoding="utf-8"))["config"] or {}
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            return {}
