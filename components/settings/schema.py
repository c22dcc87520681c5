"""The JSON Schema of stack files: editors complete and check `Pulumi.<stack>.yaml` by it.

``python -m components.settings.schema`` writes settings.schema.json; with ``--check`` it only says
whether the file is current.
"""

import json
import sys
from pathlib import Path
from typing import Any

from components.settings.stack import Settings

FILE = Path(__file__).parents[2] / "settings.schema.json"

_SECRET = {
    "description": "A secret, as `pulumi config set --secret --path` writes it.",
    "anyOf": [
        {
            "type": "object",
            "properties": {"secure": {"type": "string"}},
            "required": ["secure"],
            "additionalProperties": False,
        },
        {"type": "string"},
    ],
}


def stack_file_schema() -> dict[str, Any]:
    """The schema of a whole stack file.

    Keys of other namespaces than `homelab:` are free. Secrets are not demanded, although
    :func:`components.settings.load` does: a stack file is complete without them until a person
    encrypts them with a passphrase of their own.
    """
    settings = _tidied(Settings.model_json_schema())
    keys = settings["properties"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Stack file of homelab",
        "description": settings["description"],
        "type": "object",
        "properties": {
            "config": {
                "type": "object",
                "properties": {f"homelab:{key}": schema for key, schema in keys.items()},
                "patternProperties": {f"^homelab:(?!(?:{'|'.join(keys)})$)": False},
                "required": [f"homelab:{key}" for key in settings["required"]],
            }
        },
        "required": ["config"],
        "$defs": {**settings["$defs"], "secret": _SECRET},
    }


def _tidied(schema: dict[str, Any]) -> dict[str, Any]:
    """Without generated titles and null as a choice; secrets may be encrypted."""
    if "anyOf" in schema:
        choices = [choice for choice in schema["anyOf"] if choice != {"type": "null"}]
        if len(choices) == 1:
            schema = {**choices[0], **{k: v for k, v in schema.items() if k != "anyOf"}}
    if schema.get("format") == "password":
        schema = {"$ref": "#/$defs/secret", "description": schema.get("description", "A secret.")}
    tidy: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("title", "propertyNames") or (
            key == "default" and (value is None or "$ref" in schema)
        ):
            continue
        if key in ("properties", "$defs"):
            tidy[key] = {name: _tidied(part) for name, part in value.items()}
        elif isinstance(value, dict) and key not in ("default", "discriminator"):
            tidy[key] = _tidied(value)
        elif isinstance(value, list) and key in ("anyOf", "oneOf"):
            tidy[key] = [_tidied(part) for part in value]
        else:
            tidy[key] = value
    if "patternProperties" in tidy:
        tidy["additionalProperties"] = False
    if "required" in tidy:
        tidy["required"] = [
            name
            for name in tidy["required"]
            if tidy["properties"][name].get("$ref") != "#/$defs/secret"
        ]
    return tidy


def main(arguments: list[str]) -> int:
    """Writes the file, or with ``--check`` compares it. Returns the exit code."""
    text = json.dumps(stack_file_schema(), indent=2) + "\n"
    if arguments == ["--check"]:
        if FILE.is_file() and FILE.read_text(encoding="utf-8") == text:
            return 0
        print(
            f"{FILE.name} is not current. Remedy: python -m components.settings.schema",
            file=sys.stderr,
        )
        return 1
    if arguments:
        print("usage: python -m components.settings.schema [--check]", file=sys.stderr)
        return 2
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
