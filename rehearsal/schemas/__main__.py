"""`python -m rehearsal.schemas`: derive the schemas from the installed SDKs and write them.

To take another resource type or function in use, add it to :data:`IN_USE`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import pulumi
from pulumi import _types as sdk_types

from rehearsal.core import Properties
from rehearsal.schemas import DIRECTORY

IN_USE: dict[str, tuple[list[str], list[str]]] = {
    "command": (["local.Command"], ["local.run"]),
    "docker": (["Container", "Network", "RemoteImage", "Volume"], []),
    "cloudflare": (
        [
            "DnsRecord",
            "ZeroTrustAccessApplication",
            "ZeroTrustAccessPolicy",
            "ZeroTrustTunnelCloudflared",
            "ZeroTrustTunnelCloudflaredConfig",
        ],
        [
            "get_dns_records",
            "get_zero_trust_access_applications",
            "get_zero_trust_access_policies",
            "get_zero_trust_tunnel_cloudflared_token",
            "get_zero_trust_tunnel_cloudflareds",
        ],
    ),
}
"""By package: resource classes and functions, as attributes of `pulumi_<package>`."""

_SCALARS = {str: "string", bool: "boolean", int: "integer", float: "number"}


class _Derivation:
    """Collects the named types that the specs of one package refer to."""

    def __init__(self) -> None:
        self.types: dict[str, Properties] = {}

    def spec(self, annotation: Any) -> Properties:
        """The type spec of an annotation, without Input, Output, Optional and dict variants."""
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Union or origin is types.UnionType:
            return self._union(args)
        if origin in (list, Sequence):
            return {"type": "array", "items": self.spec(args[0])}
        if origin in (dict, Mapping):
            return {"type": "object", "additionalProperties": self.spec(args[1])}
        if annotation in _SCALARS:
            return {"type": _SCALARS[annotation]}
        if isinstance(annotation, type) and issubclass(annotation, Enum):
            return {"enum": [member.value for member in annotation]}
        if isinstance(annotation, type) and sdk_types.is_input_type(annotation):
            return {"$ref": "#/types/" + self._named(annotation)}
        return {"type": "any"}

    def _union(self, args: tuple[Any, ...]) -> Properties:
        # Input[T] is T | Awaitable[T] | Output: what is awaited names T without loss.
        for arg in args:
            if typing.get_origin(arg) is Awaitable:
                return self.spec(typing.get_args(arg)[0])
        members = [arg for arg in args if arg is not type(None) and not typing.is_typeddict(arg)]
        return self.spec(members[0]) if len(members) == 1 else {"type": "any"}

    def _named(self, cls: type) -> str:
        name = cls.__name__.removesuffix("Args")
        if name not in self.types:
            self.types[name] = {}
            properties, required = self.arguments(cls)
            self.types[name].update(properties=properties, required=required)
        return name

    def arguments(self, cls: type) -> tuple[Properties, list[str]]:
        """The properties of an Args class by their Pulumi names, and the required ones."""
        names = sdk_types.input_type_py_to_pulumi_names(cls)
        hints = _hints(cls.__init__)
        properties, required = {}, []
        for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
            properties[names[name]] = self.spec(hints[name])
            if parameter.default is inspect.Parameter.empty:
                required.append(names[name])
        return properties, required


def derive(package: str) -> Properties:
    """The schema of a package's resource types and functions in use."""
    module = importlib.import_module(f"pulumi_{package}")
    provider = importlib.import_module(f"pulumi_{package}.provider")
    resources, functions = IN_USE[package]
    derivation = _Derivation()
    schema: Properties = {
        "name": package,
        "version": importlib.metadata.version(f"pulumi_{package}"),
        "provider": {"inputProperties": derivation.arguments(provider.ProviderArgs)[0]},
        "resources": {},
        "functions": {},
    }
    for path in resources:
        cls = _attribute(module, path)
        args = getattr(sys.modules[cls.__module__], cls.__name__ + "Args")
        properties, required = derivation.arguments(args)
        schema["resources"][cls.pulumi_type] = {
            "inputProperties": properties,
            "requiredInputs": required,
            "outputs": sorted(sdk_types.resource_py_to_pulumi_names(cls).values()),
        }
    for path in functions:
        function = _attribute(module, path)
        schema["functions"][_function_token(function)] = {
            "inputs": _function_inputs(derivation, function)
        }
    schema["types"] = derivation.types
    return schema


def _attribute(module: types.ModuleType, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    # Input refers to Output by names that the SDK's modules do not import.
    names = vars(sys.modules[function.__module__])
    return typing.get_type_hints(function, names, {"Output": pulumi.Output, "T": Any})


def _function_token(function: Callable[..., Any]) -> str:
    found = re.search(r"runtime\.invoke\('([^']+)'", inspect.getsource(function))
    if found is None:
        raise ValueError(f"{function.__name__} calls no invoke: the SDK's layout changed")
    return found[1]


def _function_inputs(derivation: _Derivation, function: Callable[..., Any]) -> Properties:
    # Every argument of the plain form is optional; the output form tells which are.
    output = getattr(sys.modules[function.__module__], function.__name__ + "_output")
    hints = _hints(output)
    assigned = re.findall(r"__args__\['(\w+)'\] = (\w+)", inspect.getsource(function))
    names = {name: pulumi_name for pulumi_name, name in assigned}
    return {
        "properties": {names[name]: derivation.spec(hints[name]) for name in names},
        "required": [names[name] for name in names if not _accepts_none(hints[name])],
    }


def _accepts_none(annotation: Any) -> bool:
    for arg in typing.get_args(annotation):
        if typing.get_origin(arg) is Awaitable:
            return type(None) in typing.get_args(typing.get_args(arg)[0])
    return True


def text(package: str) -> str:
    """The text of a package's schema file."""
    return json.dumps(derive(package), indent=1, sort_keys=True) + "\n"


def main() -> None:
    for package in IN_USE:
        (DIRECTORY / f"{package}.json").write_text(text(package))


if __name__ == "__main__":
    main()
