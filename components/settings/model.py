"""What settings are built from: the frozen model, and leaf types that say what is allowed."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, SecretStr
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from components import versions

_PLACEHOLDER = re.compile(r"<[^<>]*>|(?i:replace|change).?me|REPLACE.*", re.DOTALL)


def camel_case(name: str) -> str:
    """The YAML key of an attribute: ``k3s_args`` is k3sArgs, where pydantic's own makes k3SArgs."""
    first, *others = name.split("_")
    return first + "".join(part[:1].upper() + part[1:] for part in others)


class Model(BaseModel):
    """A mapping of the stack file: frozen, camelCase keys in YAML, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=camel_case,
        validate_by_alias=True,
        validate_by_name=True,
        hide_input_in_errors=True,
    )


@dataclass(frozen=True)
class Rule:
    """What a leaf may be. ``allowed`` and ``remedy`` go into the error, ``example`` into the JSON
    Schema.

    The example is a valid value: it also takes the place of a refused one while the rest of a
    stack file is checked.
    """

    allowed: str
    remedy: str
    example: Any

    def error(self) -> PydanticCustomError:
        """The error of a refused value; it does not carry the value."""
        return PydanticCustomError(
            "setting", "{allowed}", {"allowed": self.allowed, "remedy": self.remedy}
        )


@dataclass(frozen=True)
class Number(Rule):
    """A whole number from ``low`` to ``high``. Text and true/false are not numbers."""

    low: int
    high: int
    odd: bool = False

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            self._check, core_schema.int_schema(strict=True)
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        choices = list(range(self.low, self.high + 1, 2))
        return (
            {"type": "integer", "enum": choices}
            if self.odd
            else {"type": "integer", "minimum": self.low, "maximum": self.high}
        )

    def _check(self, value: int) -> int:
        if not self.low <= value <= self.high or (self.odd and value % 2 == 0):
            raise self.error()
        return value


@dataclass(frozen=True)
class Text(Rule):
    """Text that matches ``pattern`` as a whole and passes ``check``.

    Patterns are written for ASCII alone, so control characters, line ends and look-alikes of other
    scripts are refused everywhere.
    ``shown`` False keeps a refused value out of the error, for a leaf that is easily given a
    secret by mistake.
    """

    pattern: str
    check: Callable[[str], bool] | None = None
    shown: bool = True

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {
            **handler(schema),
            "pattern": f"^(?:{self.pattern})$",
            # What an editor's YAML support shows in place of the pattern.
            "patternErrorMessage": f"Allowed: {self.allowed}",
        }

    def _check(self, value: Any) -> Any:
        secret = isinstance(value, SecretStr)
        text = value.get_secret_value() if secret else value
        if (
            re.fullmatch(self.pattern, text) is None
            or (secret and _PLACEHOLDER.fullmatch(text))
            or (self.check is not None and not self.check(text))
        ):
            raise self.error()
        return value


_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_SEGMENT = r"[A-Za-z0-9_@+=,.-]+"
_HOST_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST_NAME = r"(?:(?!-)[A-Za-z0-9-]{1,63}(?<!-)\.)*(?!-)[A-Za-z0-9-]{1,63}(?<!-)"


def is_clean_path(path: str) -> bool:
    """No way up or around, and no longer than Linux takes."""
    return len(path) <= 4096 and not {".", ".."} & set(path.split("/"))


def is_address(text: str) -> bool:
    """Whether it is an IPv4 or IPv6 address."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def is_ipv4(text: str) -> bool:
    try:
        IPv4Address(text)
    except ValueError:
        return False
    return True


def is_host(text: str) -> bool:
    """Whether a machine can have it as its name or as its IP address."""
    if is_address(text):
        address = ip_address(text)
        return not (address.is_unspecified or address.is_multicast)
    return re.fullmatch(_HOST_NAME, text) is not None and hostname_is_valid(text)


def hostname_is_valid(name: str) -> bool:
    """Length limits of DNS, and a last label that cannot be taken for a number."""
    return len(name) <= 253 and not name.rsplit(".", 1)[-1].isdigit()


Port = Annotated[
    int,
    Number("a port from 1 to 65535", "write a port in that range, without quotes", 8080, 1, 65535),
]
Name = Annotated[
    str,
    Text(
        "lower-case letters, digits and hyphens, at most 63, beginning and ending with a letter "
        "or digit",
        "choose a name of that form",
        "example",
        _LABEL,
    ),
]
ObjectName = Annotated[
    str,
    Text(
        "a name of a Kubernetes object: lower-case letters, digits, hyphens and dots, at most 253",
        "choose a name of that form",
        "example",
        rf"{_LABEL}(?:\.{_LABEL})*",
        lambda name: len(name) <= 253,
    ),
]
ObjectReference = Annotated[
    str,
    Text(
        "an object as kubectl names it: its kind, then namespace/name, or its name alone where it "
        "is in no namespace",
        'write it as in "Deployment factory/cloudflared-factory"',
        "Secret default/example",
        rf"[A-Z][A-Za-z0-9]{{0,62}} (?:{_LABEL}/)?[a-z0-9][a-z0-9.:-]{{0,252}}",
    ),
]
Hostname = Annotated[
    str,
    Text(
        "a host name in lower case such as app.example.org, without scheme, port, path or wildcard",
        "write the bare host name; a port belongs into the service",
        "app.example.org",
        rf"{_LABEL}(?:\.{_LABEL})+",
        hostname_is_valid,
    ),
]
AbsolutePath = Annotated[
    str,
    Text(
        "an absolute path of letters, digits and _ @ + = , . - without `..`",
        "write the path from / on, as it is on that machine",
        "/var/lib/homelab/example",
        rf"(?:/{_SEGMENT})+",
        is_clean_path,
    ),
]
SecretFile = Annotated[
    str,
    Text(
        "an absolute path of letters, digits and _ @ + = , . - without `..`",
        "write the path of the decrypted file from / on; a value itself belongs into an "
        "encrypted setting",
        "/run/agenix/example",
        rf"(?:/{_SEGMENT})+",
        is_clean_path,
        shown=False,
    ),
]
OperatorPath = Annotated[
    str,
    Text(
        "an absolute path, or one that begins with ~/",
        "write the path from / or ~/ on, as it is on the machine that runs Pulumi",
        "~/.ssh/known_hosts",
        rf"~?(?:/{_SEGMENT})+",
        is_clean_path,
    ),
]
Account = Annotated[
    str,
    Text(
        "a name of a user or group: lower-case letters, digits, _ and -, at most 32, beginning "
        "with a letter or _",
        "write the name as `getent` shows it",
        "root",
        r"[a-z_][a-z0-9_-]{0,31}",
    ),
]


_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"


def _image_is_pinned(reference: str) -> bool:
    name, _, digest = reference.partition("@")
    tag = name.rsplit("/", 1)[-1].partition(":")[2]
    return bool(tag or digest) and tag.lower() != "latest" and len(name) <= 255


Image = Annotated[
    str,
    Text(
        "an image with a tag other than `latest`, or with a digest (@sha256:...)",
        "pin the version that was tested: an unpinned image changes under the stack (incident 9)",
        versions.K3S,
        # Docker's grammar (github.com/distribution/reference).
        rf"(?:{_HOST_LABEL}(?:\.{_HOST_LABEL})*(?::[0-9]{{1,5}})?/)?{_PART}(?:/{_PART})*"
        r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
        _image_is_pinned,
    ),
]
HexId = Annotated[
    str,
    Text(
        "32 hexadecimal digits in lower case",
        "copy the id from the overview page of the account or zone in Cloudflare's dashboard",
        "0123456789abcdef0123456789abcdef",
        r"[0-9a-f]{32}",
    ),
]
OpaqueSecret = Annotated[
    SecretStr,
    Text(
        "text without blanks or control characters that is not a placeholder",
        "give it the real value",
        "made-up-example",
        r"[!-~]+",
    ),
]


_CRON_RANGE = r"[0-9]{1,2}(?:-[0-9]{1,2})?"
_CRON_FIELD = rf"(?:\*|{_CRON_RANGE}(?:,{_CRON_RANGE})*)(?:/[0-9]{{1,2}})?"

Cron = Annotated[
    str,
    Text(
        "five fields of cron: minute, hour, day of the month, month, day of the week",
        "write all five, in quotes",
        "0 3 * * *",
        rf"{_CRON_FIELD}(?: {_CRON_FIELD}){{4}}",
    ),
]
