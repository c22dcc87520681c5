"""What the stand-ins of bridged Terraform providers share: what pulumi-terraform-bridge does."""

from __future__ import annotations

from typing import Any

from rehearsal.core import UNKNOWN, Checked, Diff, Properties, Provider, Request, compare, reveal
from rehearsal.schemas import Problem, Schema


class Bridged(Provider):
    """A bridged provider: checks against its schema, configuration and refreshed inputs."""

    schema: Schema

    def check_config(self, request: Request) -> Checked:
        known = self.schema.provider["inputProperties"]
        failures = [
            (
                "",
                "could not validate provider configuration: Invalid or unknown key. "
                f"Examine values at '{request.name}.{name}'.",
            )
            for name in request.news
            if name not in known and name not in ("version", "pluginDownloadURL")
        ]
        return Checked(request.news, failures)

    def diff_config(self, request: Request) -> Diff:
        detailed = compare(request.olds, request.news)
        return Diff(
            changes=True if detailed else None,
            detailed=detailed,
            has_detailed=False,
            diffs=sorted(detailed),
            input_diff=True,
        )

    def failures(self, request: Request) -> list[tuple[str, str]]:
        """The check failures of a resource's inputs, as the bridge words them."""
        problems = self.schema.check_resource(request.type, request.news)
        return [("", wording(problem, request.name)) for problem in problems]

    def refreshed(self, request: Request, properties: Properties) -> Properties:
        """The inputs of an object that was read: the stored ones, except where it has drifted.

        An object that is imported has no stored ones: whatever it holds becomes input.
        """
        names = self.schema.inputs(request.type)
        if not request.old_inputs:
            return {name: properties[name] for name in names if present(properties.get(name))}
        inputs = dict(request.old_inputs)
        for name, value in request.old_inputs.items():
            if name in names and drifted(value, properties.get(name)):
                inputs[name] = properties.get(name)
        return inputs


def wording(problem: Problem, resource: str) -> str:
    """How the bridge tells of a problem (check_failures.go, typechecker)."""
    if problem.kind == "missing":
        return f"Missing required property '{problem.path}'"
    if problem.kind == "unknown":
        return f"Invalid or unknown key. Examine values at '{resource}.{problem.path}'."
    return (
        f'Unexpected type at field "{problem.path}": expected {problem.detail} type, '
        f"got {type(problem.value).__name__}"
    )


def present(value: Any) -> bool:
    """Whether Terraform sees a value here: null, empty and zero are all absence to SDKv2."""
    return value is UNKNOWN or bool(reveal(value))


def normal(value: Any) -> Any:
    """The value without what Terraform takes for absence, so that state and input compare."""
    value = reveal(value)
    if isinstance(value, dict):
        kept = {k: normal(v) for k, v in value.items() if not k.startswith("__")}
        return {k: v for k, v in kept.items() if present(v)}
    if isinstance(value, list):
        return [normal(item) for item in value]
    return value


def drifted(wanted: Any, live: Any) -> bool:
    """Whether a live value is another than the wanted one. What nobody asked for does not count."""
    wanted, live = normal(wanted), normal(live)
    if isinstance(wanted, dict) and isinstance(live, dict):
        return any(drifted(value, live.get(name)) for name, value in wanted.items())
    if isinstance(wanted, list) and isinstance(live, list) and len(wanted) == len(live):
        return any(drifted(*pair) for pair in zip(wanted, live, strict=True))
    return (present(wanted) or present(live)) and wanted != live
