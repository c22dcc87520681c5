"""What every stand-in provider shares: the provider protocol, its values, a world, and faults.

A provider is a subclass of :class:`Provider`, served by :func:`serve`:

    class Docker(Provider):
        package = "docker"
        configuration = {"supportsPreview": True}          # fields of ConfigureResponse

        def check(self, request): ...                      # -> Checked
        def diff(self, request): ...                       # -> Diff
        def create(self, request): ...                     # -> (id, properties)
        def read(self, request): ...                       # -> (id, properties, inputs) or None
        def update(self, request): ...                     # -> properties
        def delete(self, request): ...                     # -> None
        def invoke(self, token, args, preview): ...        # -> return value (a dict)

    if __name__ == "__main__":
        serve(Docker)

A method that the provider does not define is answered Unimplemented. `check_config`, `diff_config`,
`configure` and `construct` exist as well; a method may raise :class:`Unimplemented` itself.

Values. Property maps are plain Python: dict, list, str, int, float, bool, None, and
  * :data:`UNKNOWN`, one object, for every kind of value the engine does not know yet (it is written
    back as the unknown string, as the official plugins do for computed outputs);
  * :class:`Secret`, a wrapper round a secret value at any depth. The engine sends secrets only to a
    provider that says `acceptSecrets`; :func:`plain` strips them all, :func:`reveal` one layer;
  * assets and archives, kept as the dict they came as and written back unchanged;
  * a resource reference arrives as its id, an output value as what it holds.
A whole number is an int.

World. `self.world` keeps the objects that the provider made, each a JSON file
`<rehearsal>/world/<package>/<key>.json`, so that drift is made by editing or deleting a file and a
killed provider forgets nothing. A key is a natural key such as `network/k3d-factory`.

Errors. Raise :class:`Failure` for an error of the provider (gRPC code Unknown unless told) and
:class:`InitFailed` for an object that exists but did not get ready, which the engine then stores.

Faults. `<rehearsal>/faults.json` makes a step fail, hang, come late or kill the provider: see
:class:`Faults`.

The protocol is provider.proto of github.com/pulumi/pulumi; each answer's shape follows the
recordings in tests/golden.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import quote, unquote

import grpc
from google.protobuf import empty_pb2, struct_pb2

if TYPE_CHECKING:
    from pulumi.runtime.proto import (
        engine_pb2,
        engine_pb2_grpc,
        plugin_pb2,
        provider_pb2,
        provider_pb2_grpc,
        status_pb2,
    )
else:
    # Importing pulumi.runtime.proto executes the whole SDK, three times the cost of grpc, for each
    # of four plugins at every command. Its generated messages need none of that.
    _messages = types.ModuleType("rehearsal._messages")
    _messages.__path__ = [
        str(Path(importlib.util.find_spec("pulumi").origin).parent / "runtime" / "proto")
    ]
    sys.modules[_messages.__name__] = _messages
    engine_pb2 = importlib.import_module("rehearsal._messages.engine_pb2")
    engine_pb2_grpc = importlib.import_module("rehearsal._messages.engine_pb2_grpc")
    plugin_pb2 = importlib.import_module("rehearsal._messages.plugin_pb2")
    provider_pb2 = importlib.import_module("rehearsal._messages.provider_pb2")
    provider_pb2_grpc = importlib.import_module("rehearsal._messages.provider_pb2_grpc")
    status_pb2 = importlib.import_module("rehearsal._messages.status_pb2")

ASIDE = ".tmp"
"""How the name of a file ends that a stand-in has not yet written whole."""
MARKER = "HOMELAB_REHEARSAL"
"""The environment variable that marks a rehearsal and names its directory."""

REALLY = "HOMELAB_REHEARSAL_RUN"
"""The environment variable that, being 1, lets the stand-ins of a rehearsal act for real: commands
run, and objects are made in the Docker engine and the API server that the program names."""

Properties = dict[str, Any]


# Values


class _Unknown:
    """The type of :data:`UNKNOWN`."""

    def __repr__(self) -> str:
        return "UNKNOWN"

    def __copy__(self) -> _Unknown:
        return self

    def __deepcopy__(self, memo: object) -> _Unknown:
        return self


UNKNOWN = _Unknown()
"""A value that the engine does not know yet, of whatever kind."""


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret value. Its text never shows in a repr."""

    value: Any = field(repr=False)


# sdk/go/common/resource/plugin/rpc.go and sdk/go/common/resource/sig of pulumi/pulumi.
_SIGNATURE = "4dabf18193072939515e22adb298388d"
_SECRET = "1b47061264138c4ac30d75fd1eb44270"
_RESOURCE = "5cf8f73096256a8f31e491e813e4eb8e"
_OUTPUT = "d0e6a833031e9bbcd3f4e8bde6ca49a4"
_UNKNOWN_STRING = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
_UNKNOWNS = frozenset(
    {
        _UNKNOWN_STRING,
        "1c4a061d-8072-4f0a-a4cb-0ff528b18fe7",  # boolean
        "3eeb2bf0-c639-47a8-9e75-3b44932eb421",  # number
        "6a19a0b0-7e62-4c92-b797-7f8e31da9cc2",  # array
        "030794c1-ac77-496b-92df-f27374a8bd58",  # asset
        "e48ece36-62e2-4504-bad9-02848725956a",  # archive
        "dd056dcd-154b-4c76-9bd3-c8f88648b5ff",  # object
    }
)


def unmarshal(struct: struct_pb2.Struct) -> Properties:
    """The property map that a message holds."""
    return {key: _unmarshal(value) for key, value in struct.fields.items()}


def _unmarshal(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        text = value.string_value
        return UNKNOWN if text in _UNKNOWNS else text
    if kind == "struct_value":
        fields = unmarshal(value.struct_value)
        signature = fields.get(_SIGNATURE)
        if signature is None:
            return fields
        if signature == _SECRET:
            return Secret(fields.get("value"))
        if signature == _OUTPUT:
            held = fields.get("value", UNKNOWN)
            return Secret(held) if fields.get("secret") else held
        if signature == _RESOURCE:
            return fields.get("id")
        return fields
    if kind == "list_value":
        return [_unmarshal(item) for item in value.list_value.values]
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() else number
    if kind == "bool_value":
        return value.bool_value
    return None


def marshal(properties: Properties) -> struct_pb2.Struct:
    """The message that holds a property map: the inverse of :func:`unmarshal`."""
    struct = struct_pb2.Struct()
    _marshal_fields(properties, struct)
    return struct


def _marshal_fields(properties: Properties, struct: struct_pb2.Struct) -> None:
    fields = struct.fields
    for key, value in properties.items():
        _marshal(value, fields[key])


def _marshal(value: Any, into: struct_pb2.Value) -> None:
    if isinstance(value, str):
        into.string_value = value
    elif value is None:
        into.null_value = struct_pb2.NULL_VALUE
    elif value is UNKNOWN:
        into.string_value = _UNKNOWN_STRING
    elif isinstance(value, bool):
        into.bool_value = value
    elif isinstance(value, (int, float)):
        into.number_value = value
    elif isinstance(value, dict):
        # An empty message counts as set only once it is touched.
        into.struct_value.SetInParent()
        _marshal_fields(value, into.struct_value)
    elif isinstance(value, (list, tuple)):
        into.list_value.SetInParent()
        values = into.list_value.values
        for item in value:
            _marshal(item, values.add())
    elif isinstance(value, Secret):
        fields = into.struct_value.fields
        fields[_SIGNATURE].string_value = _SECRET
        _marshal(value.value, fields["value"])
    else:
        raise TypeError(f"no property value: {type(value).__name__}")


def reveal(value: Any) -> Any:
    """The value without its own secret mark; marks further inside stay."""
    while isinstance(value, Secret):
        value = value.value
    return value


def plain(value: Any) -> Any:
    """The value without any secret mark. Unknowns stay."""
    value = reveal(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def has_unknown(value: Any) -> bool:
    """Whether the value is or contains an unknown."""
    value = reveal(value)
    if isinstance(value, dict):
        return any(has_unknown(item) for item in value.values())
    if isinstance(value, list):
        return any(has_unknown(item) for item in value)
    return value is UNKNOWN


def has_secret(value: Any) -> bool:
    """Whether the value is or contains a secret."""
    if isinstance(value, dict):
        return any(has_secret(item) for item in value.values())
    if isinstance(value, list):
        return any(has_secret(item) for item in value)
    return isinstance(value, Secret)


# Differences

DiffKind = Literal["ADD", "ADD_REPLACE", "DELETE", "DELETE_REPLACE", "UPDATE", "UPDATE_REPLACE"]


def property_path(parent: str, key: str | int) -> str:
    """A property path one step down, in the engine's syntax: `a.b`, `a[0]`, `a["x.y"]`."""
    if isinstance(key, int):
        return f"{parent}[{key}]"
    if not key or any(c in key for c in '.["'):
        escaped = key.replace("\\", "\\\\").replace('"', '\\"')
        return f'{parent}["{escaped}"]'
    return f"{parent}.{key}" if parent else key


def compare(old: Any, new: Any, path: str = "") -> dict[str, DiffKind]:
    """Where two values differ, by path, as the engine's own object difference sees it.

    Secret marks do not count. An unknown differs from every known value. Keys that begin with `__`
    belong to the plugin and are left out.
    """
    old, new = reveal(old), reveal(new)
    found: dict[str, DiffKind] = {}
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if key.startswith("__"):
                continue
            step = property_path(path, key)
            if key not in new:
                found[step] = "DELETE"
            elif key not in old:
                found[step] = "ADD"
            else:
                found.update(compare(old[key], new[key], step))
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            step = property_path(path, index)
            if index >= len(new):
                found[step] = "DELETE"
            elif index >= len(old):
                found[step] = "ADD"
            else:
                found.update(compare(old[index], new[index], step))
    elif old is UNKNOWN or new is UNKNOWN or type(old) is not type(new) or old != new:
        found[path] = "UPDATE"
    return found


# What a provider is asked and answers


@dataclass(slots=True)
class Request:
    """One call about one resource. Fields that a method does not use are empty."""

    urn: str
    type: str
    name: str
    id: str = ""
    preview: bool = False
    olds: Properties = field(default_factory=dict)
    """Check: the old inputs. Diff, Update: the old outputs. Read, Delete: the stored outputs."""
    news: Properties = field(default_factory=dict)
    """The new inputs; for Create, its properties."""
    old_inputs: Properties = field(default_factory=dict)
    """Diff, Update, Delete: the inputs that made the stored object. Read: the stored inputs."""
    ignore_changes: tuple[str, ...] = ()
    timeout: float = 0.0
    """customTimeouts of this step in seconds; 0 when none is set."""
    seed: bytes = b""
    """Check: the random seed for generated names."""


@dataclass(slots=True)
class Checked:
    """An answer to Check or CheckConfig: the inputs to go on with, or why they are refused."""

    inputs: Properties
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of property path ("" for the whole) and reason."""


@dataclass(slots=True)
class Diff:
    """An answer to Diff or DiffConfig. `changes` None is the protocol's DIFF_UNKNOWN."""

    changes: bool | None = None
    detailed: dict[str, DiffKind] = field(default_factory=dict)
    has_detailed: bool = True
    diffs: list[str] = field(default_factory=list)
    replaces: list[str] = field(default_factory=list)
    stables: list[str] = field(default_factory=list)
    delete_before_replace: bool = False
    input_diff: bool = False
    """Whether the paths of `detailed` are those of inputs against inputs."""


class Failure(Exception):
    """An error that the provider answers. `code` names the gRPC status, by default UNKNOWN."""

    def __init__(self, message: str, code: str = "UNKNOWN") -> None:
        super().__init__(message)
        self.code = code


class Unimplemented(Failure):
    """The provider does not serve this method."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "UNIMPLEMENTED")


class InitFailed(Failure):
    """The object was made or changed but did not become ready: the engine stores and retries it."""

    def __init__(
        self, message: str, id: str, properties: Properties, inputs: Properties, reasons: list[str]
    ) -> None:
        super().__init__(message)
        self.id, self.properties, self.inputs, self.reasons = id, properties, inputs, reasons

    def details(self) -> bytes:
        """The status details that carry the object to the engine."""
        status = status_pb2.Status(code=grpc.StatusCode.UNKNOWN.value[0], message=str(self))
        status.details.add().Pack(
            provider_pb2.ErrorResourceInitFailed(
                id=self.id,
                properties=marshal(self.properties),
                inputs=marshal(self.inputs),
                reasons=self.reasons,
            )
        )
        return status.SerializeToString()


# The world


class Exists(Exception):
    """An object with this natural key is there already."""


class World:
    """The objects that a provider made, each a JSON file under `root`.

    Keys are paths such as `network/k3d-factory`; each part is percent-encoded into a file name. An
    object may be found by its id too, if `create` was given one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*(_file_name(part) for part in key.split("/")))

    def _file(self, key: str) -> Path:
        path = self._path(key)
        return path.with_name(path.name + ".json")

    def _index(self, id: str) -> Path:
        return self.root / ".ids" / _file_name(id)

    def _write_aside(self, target: Path, text: str) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = target.with_name(f".{os.getpid()}-{threading.get_ident()}{ASIDE}")
        aside.write_text(text)
        return aside

    def create(self, key: str, thing: Properties, id: str | None = None) -> None:
        """Make an object, whole or not at all. Raises :class:`Exists` if the key is taken."""
        target = self._file(key)
        aside = self._write_aside(target, _dump(thing))
        try:
            os.link(aside, target)
        except FileExistsError:
            raise Exists(key) from None
        finally:
            aside.unlink()
        if id is not None:
            index = self._index(id)
            self._write_aside(index, key).replace(index)

    def get(self, key: str) -> Properties | None:
        """The object with this key, or None."""
        try:
            text = self._file(key).read_text()
        except FileNotFoundError:
            return None
        try:
            return json.loads(text)
        except ValueError as error:
            raise Failure(f"{self._file(key)} is not JSON: {error}") from None

    def find(self, id: str, kind: str) -> tuple[str, Properties] | None:
        """The key and object of the kind (a key's first part) whose `id` is this one, or None."""
        with suppress(FileNotFoundError):
            key = self._index(id).read_text()
            thing = self.get(key)
            if thing is not None and thing.get("id") == id and key.startswith(kind + "/"):
                return key, thing
        # An object that was put here by hand is in no index.
        return next(((k, t) for k, t in self.list(kind) if t.get("id") == id), None)

    def put(self, key: str, thing: Properties) -> None:
        """Write an object, whole or not at all, whether it was there or not."""
        target = self._file(key)
        self._write_aside(target, _dump(thing)).replace(target)

    def delete(self, key: str) -> bool:
        """Remove an object. Returns whether it was there."""
        thing = self.get(key)
        if thing is None:
            return False
        self._file(key).unlink(missing_ok=True)
        index = self._index(str(thing.get("id")))
        # An object that moved to another key keeps its id.
        with suppress(FileNotFoundError):
            if index.read_text() == key:
                index.unlink()
        return True

    def list(self, prefix: str) -> Iterator[tuple[str, Properties]]:
        """Keys and objects below a key, in the keys' order."""
        for path in sorted(self._path(prefix).rglob("*.json")):
            key = "/".join(map(unquote, path.relative_to(self.root).with_suffix("").parts))
            thing = self.get(key)
            if thing is not None:
                yield key, thing


def _file_name(text: str) -> str:
    # No name may be hidden, empty or lead elsewhere.
    return re.sub(r"^\.|^$", "%2E", quote(text, safe=" @:+=,"))


def _dump(thing: Properties) -> str:
    return json.dumps(thing, indent=1, sort_keys=True) + "\n"


# Faults


class Faults:
    """The faults of `<rehearsal>/faults.json`, a list of

        {"provider": "docker", "method": "Create", "urn": "*::k3d-factory", "when": "before",
         "do": "fail", "message": "no space left", "seconds": 5, "whom": "provider", "times": 1,
         "each": false, "preview": false}

    `provider` is a package; it, `method` and `urn` are patterns (fnmatch; for Invoke, `urn` is
    matched against the function's token), all `*` by default. `when`: `before` the step; `after`
    the world was changed and before the answer; with `kill` also once the engine has `recorded` the
    answer in the state. `do`: `fail` with `message`; `hang` until the step's time limit
    (customTimeouts), which is over at once, or without one until the engine gives up; come `late`
    by `seconds` (1 by default); `kill` a process, `whom`: the `provider`'s (by default), the
    `engine`'s or the `program`'s. `times` (1 by default) is counted across processes; of `each`
    method and URN by itself if that is true. A preview's calls are spared unless `preview` is true.
    """

    def __init__(self, directory: Path, package: str, expired: str = "") -> None:
        self.package = package
        self.expired = expired
        self.file = directory / "faults.json"
        self.stacks = directory / "state" / ".pulumi" / "stacks"
        self.taken = directory / "faults"
        self.cancelled = threading.Event()
        self._read: tuple[int, list[Properties]] = (0, [])

    def strike(
        self, when: str, method: str, subject: str, preview: bool, timeout: float = 0.0
    ) -> None:
        """Let the first fault that fits happen, if there is one."""
        for fault in self._faults():
            if (
                fnmatch.fnmatchcase(self.package, fault.get("provider", "*"))
                and fault.get("when", "before") == when
                and fnmatch.fnmatchcase(method, fault.get("method", "*"))
                and fnmatch.fnmatchcase(subject, fault.get("urn", "*"))
                and (not preview or fault.get("preview", False))
                and self._count(fault, method, subject)
            ):
                self._happen(fault, when, method, subject, timeout)
                return

    def _faults(self) -> list[Properties]:
        try:
            stamp = self.file.stat().st_mtime_ns
        except FileNotFoundError:
            return []
        if stamp != self._read[0]:
            try:
                faults = json.loads(self.file.read_text())
            except ValueError as error:
                raise Failure(f"{self.file} is not JSON: {error}") from None
            for fault in faults:
                if fault.get("do") not in ("fail", "hang", "late", "kill"):
                    does = f'"do" is {fault.get("do")!r}'
                    raise Failure(f"{self.file}: {does}; allowed: fail, hang, late, kill")
            self._read = (stamp, faults)
        return self._read[1]

    def _count(self, fault: Properties, method: str, subject: str) -> bool:
        counted = [fault, method, subject] if fault.get("each") else fault
        digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]
        self.taken.mkdir(exist_ok=True)
        for number in range(fault.get("times", 1)):
            with suppress(FileExistsError):
                with (self.taken / f"{digest}-{number}").open("x") as file:
                    file.write(f"{method} {subject}\n")
                return True
        return False

    def _happen(
        self, fault: Properties, when: str, method: str, subject: str, timeout: float
    ) -> None:
        do, message = fault["do"], fault.get("message", f"{method} failed, as faults.json says")
        if do == "fail":
            raise Failure(message)
        if do == "kill" and when == "recorded":
            args = [fault.get("whom", "provider"), subject]
            threading.Thread(target=self._kill_once_recorded, args=args, daemon=True).start()
        elif do == "kill":
            _kill(fault.get("whom", "provider"))
        if do == "hang":
            if timeout:
                raise Failure(self.expired)
            self.cancelled.wait()
            raise Failure("cancelled", "CANCELLED")
        if do == "late":
            time.sleep(fault.get("seconds", 1))

    def _kill_once_recorded(self, whom: str, urn: str) -> None:
        """The engine writes down what it begins with before it asks a provider."""
        stack, project = urn.split("::")[0].rpartition(":")[2], urn.split("::")[1]
        state = self.stacks / project / f"{stack}.json"
        while True:
            with suppress(FileNotFoundError, ValueError):
                latest = json.loads(state.read_text())["checkpoint"]["latest"] or {}
                begun = latest.get("pending_operations") or []
                if urn not in (operation["resource"]["urn"] for operation in begun):
                    return _kill(whom)
            time.sleep(0.005)


def _kill(whom: str) -> None:
    """Kill the process of this provider, of the engine or of the Pulumi program, if it lives."""
    if whom == "provider":
        os.kill(os.getpid(), signal.SIGKILL)
    if whom == "engine":
        engine = os.getppid()
        if engine > 1:
            os.kill(engine, signal.SIGKILL)
        # Whoever serves a dead engine ends soon, and this step must not go on until then.
        threading.Event().wait()
    if whom == "program":
        # A child of the engine's child, its language host.
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                is_program = b"--program" in command or b"pulumi-language-python-exec" in command
                if is_program and _parent(_parent(int(entry.name))) == os.getppid():
                    os.kill(int(entry.name), signal.SIGKILL)


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


# The protocol


Log = Callable[[str, str, str, bool], None]
"""Shows a line: message, URN, severity, ephemeral."""


class Provider:
    """A stand-in provider: see the module's docstring."""

    package: ClassVar[str]
    version: ClassVar[str] = ""
    handshake: ClassVar[dict[str, bool] | None] = None
    """Fields of ProviderHandshakeResponse; None where the official plugin says Unimplemented."""
    configuration: ClassVar[dict[str, bool]] = {}
    """Fields of ConfigureResponse."""
    unimplemented: ClassVar[str] = "method {method} not implemented"
    """The official plugin's wording of Unimplemented."""
    expired: ClassVar[str] = "context deadline exceeded"
    """The official plugin's wording of a step that took longer than its customTimeouts."""

    def __init__(self, directory: Path, log: Log | None = None) -> None:
        self.directory = directory
        self.world = World(directory / "world" / self.package)
        self._log = log

    def log(
        self, message: str, urn: str = "", severity: str = "INFO", ephemeral: bool = False
    ) -> None:
        """Have the engine show a line. `severity`: DEBUG, INFO, WARNING or ERROR.

        An `ephemeral` line is a resource's status: shown while it changes, not kept.
        """
        if self._log is not None:
            self._log(message, urn, severity, ephemeral)

    def refuse(self, method: str) -> Unimplemented:
        """The error with which the official plugin refuses a method of the protocol."""
        return Unimplemented(self.unimplemented.format(method=method))

    def check_config(self, request: Request) -> Checked:
        """Check the provider's own configuration."""
        return Checked(request.news)

    def diff_config(self, request: Request) -> Diff:
        """Compare the provider's configuration (`request.olds`, `request.news`)."""
        raise self.refuse("DiffConfig")

    def configure(self, args: Properties) -> None:
        """Take the configuration. The engine does not call this while any of it is unknown."""

    def check(self, request: Request) -> Checked:
        raise self.refuse("Check")

    def diff(self, request: Request) -> Diff:
        raise self.refuse("Diff")

    def create(self, request: Request) -> tuple[str, Properties]:
        """Make the object; in a preview, foretell it (an unknown id is "")."""
        raise self.refuse("Create")

    def read(self, request: Request) -> tuple[str, Properties, Properties] | None:
        """The object's id, outputs and inputs as they are; None when it is gone."""
        raise self.refuse("Read")

    def update(self, request: Request) -> Properties:
        raise self.refuse("Update")

    def delete(self, request: Request) -> None:
        raise self.refuse("Delete")

    def invoke(self, token: str, args: Properties, preview: bool) -> Properties:
        """Call a function. Raise :class:`Failure` with code INVALID_ARGUMENT for bad arguments."""
        raise self.refuse("Invoke")

    def construct(self, request: Any) -> Any:
        """Build a remote component: ConstructRequest to ConstructResponse, raw."""
        raise self.refuse("Construct")


class Servicer(provider_pb2_grpc.ResourceProviderServicer):
    """Answers the protocol's calls for one provider, with faults."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.faults = Faults(provider.directory, provider.package, provider.expired)

    def _serve(
        self,
        context: grpc.ServicerContext,
        method: str,
        answer: Callable[[], Any],
        subject: str = "",
        preview: bool = False,
        timeout: float = 0.0,
    ) -> Any:
        try:
            self.faults.strike("before", method, subject, preview, timeout)
            answered = answer()
            for when in ("after", "recorded"):
                self.faults.strike(when, method, subject, preview, timeout)
            return answered
        except Failure as failure:
            if isinstance(failure, InitFailed):
                context.set_trailing_metadata((("grpc-status-details-bin", failure.details()),))
            context.abort(getattr(grpc.StatusCode, failure.code), str(failure))

    def Handshake(self, request, context):
        def answer():
            if self.provider.handshake is None:
                raise self.provider.refuse("Handshake")
            return provider_pb2.ProviderHandshakeResponse(**self.provider.handshake)

        return self._serve(context, "Handshake", answer)

    def CheckConfig(self, request, context):
        def answer():
            return _checked(self.provider.check_config(_request(request, "olds", "news")))

        return self._serve(context, "CheckConfig", answer, request.urn)

    def DiffConfig(self, request, context):
        def answer():
            asked = _request(request, "olds", "news", "old_inputs")
            return _diffed(self.provider.diff_config(asked))

        return self._serve(context, "DiffConfig", answer, request.urn)

    def Configure(self, request, context):
        def answer():
            self.provider.configure(unmarshal(request.args))
            return provider_pb2.ConfigureResponse(**self.provider.configuration)

        return self._serve(context, "Configure", answer, request.urn)

    def Check(self, request, context):
        def answer():
            return _checked(self.provider.check(_request(request, "olds", "news")))

        return self._serve(context, "Check", answer, request.urn)

    def Diff(self, request, context):
        def answer():
            return _diffed(self.provider.diff(_request(request, "olds", "news", "old_inputs")))

        return self._serve(context, "Diff", answer, request.urn)

    def Create(self, request, context):
        def answer():
            id, properties = self.provider.create(_request(request, news="properties"))
            return provider_pb2.CreateResponse(id=id, properties=marshal(properties))

        return self._serve(context, "Create", answer, request.urn, request.preview, request.timeout)

    def Read(self, request, context):
        def answer():
            asked = _request(request, olds="properties", old_inputs="inputs")
            found = self.provider.read(asked)
            if found is None:
                return provider_pb2.ReadResponse()
            id, properties, inputs = found
            return provider_pb2.ReadResponse(
                id=id, properties=marshal(properties), inputs=marshal(inputs)
            )

        return self._serve(context, "Read", answer, request.urn)

    def Update(self, request, context):
        def answer():
            asked = _request(request, "olds", "news", "old_inputs")
            return provider_pb2.UpdateResponse(properties=marshal(self.provider.update(asked)))

        return self._serve(context, "Update", answer, request.urn, request.preview, request.timeout)

    def Delete(self, request, context):
        def answer():
            self.provider.delete(_request(request, olds="properties", old_inputs="old_inputs"))
            return empty_pb2.Empty()

        return self._serve(context, "Delete", answer, request.urn, timeout=request.timeout)

    def Invoke(self, request, context):
        def answer():
            returned = self.provider.invoke(request.tok, unmarshal(request.args), request.preview)
            response = provider_pb2.InvokeResponse()
            getattr(response, "return").CopyFrom(marshal(returned))
            return response

        return self._serve(context, "Invoke", answer, request.tok, request.preview)

    def Construct(self, request, context):
        def answer():
            return self.provider.construct(request)

        return self._serve(context, "Construct", answer, request.type)

    def _refused(self, request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "a stand-in does not serve this method")

    # The generated servicer would write a traceback to stderr, which the engine shows.
    Attach = Call = GetMapping = GetMappings = GetSchema = List = Parameterize = _refused

    def GetPluginInfo(self, request, context):
        return plugin_pb2.PluginInfo(version=self.provider.version)

    def Cancel(self, request, context):
        self.faults.cancelled.set()
        return empty_pb2.Empty()


def _request(message: Any, olds: str = "", news: str = "", old_inputs: str = "") -> Request:
    """The request in a message. The arguments name the message's fields of those properties."""

    def held(name: str) -> Properties:
        return unmarshal(getattr(message, name)) if name else {}

    _, _, type_chain, name = message.urn.split("::", 3)
    return Request(
        message.urn,
        type_chain.rpartition("$")[2],
        name,
        id=getattr(message, "id", ""),
        preview=getattr(message, "preview", False),
        olds=held(olds),
        news=held(news),
        old_inputs=held(old_inputs),
        ignore_changes=tuple(getattr(message, "ignoreChanges", ())),
        timeout=getattr(message, "timeout", 0.0),
        seed=getattr(message, "randomSeed", b""),
    )


def _checked(checked: Checked) -> provider_pb2.CheckResponse:
    failures = [
        provider_pb2.CheckFailure(property=path, reason=reason) for path, reason in checked.failures
    ]
    return provider_pb2.CheckResponse(inputs=marshal(checked.inputs), failures=failures)


def _diffed(diff: Diff) -> provider_pb2.DiffResponse:
    response = provider_pb2.DiffResponse
    changes = {None: response.DIFF_UNKNOWN, False: response.DIFF_NONE, True: response.DIFF_SOME}
    return response(
        changes=changes[diff.changes],
        diffs=diff.diffs,
        replaces=diff.replaces,
        stables=diff.stables,
        deleteBeforeReplace=diff.delete_before_replace,
        hasDetailedDiff=diff.has_detailed,
        detailedDiff={
            path: provider_pb2.PropertyDiff(
                kind=provider_pb2.PropertyDiff.Kind.Value(kind), inputDiff=diff.input_diff
            )
            for path, kind in diff.detailed.items()
        },
    )


_MESSAGE_BYTES = 400 * 1024 * 1024
"""The engine's own limit (sdk/go/common/util/rpcutil)."""
_OPTIONS = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
]


def listen(provider: Provider) -> tuple[grpc.Server, int]:
    """Serve a provider on a free port of the loopback interface: the server and its port."""
    # A call that hangs holds its thread; the engine asks for many things at once.
    server = grpc.server(ThreadPoolExecutor(max_workers=64), options=_OPTIONS)
    provider_pb2_grpc.add_ResourceProviderServicer_to_server(Servicer(provider), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


def rehearsal_directory(package: str) -> Path:
    """The directory of the rehearsal that this process is part of; without one, exits with a line.

    The engine takes any plugin that it finds on PATH: a stand-in there must never serve a real run.
    """
    marked = os.environ.get(MARKER, "")
    if not marked or not Path(marked).is_dir():
        state = f"names no directory ({marked})" if marked else "is not set"
        sys.exit(
            f"pulumi-resource-{package}: this is the stand-in of a rehearsal and {MARKER} {state}; "
            f"for a real run take rehearsal/plugins off PATH"
        )
    return Path(marked)


def serve(provider: type[Provider]) -> None:
    """Be the plugin: print the port, serve until the engine ends the process or is gone itself."""
    directory = rehearsal_directory(provider.package)
    addresses = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    server, port = listen(provider(directory, _engine_log(addresses[-1]) if addresses else None))
    engine = os.getppid()
    print(port, flush=True)
    with suppress(KeyboardInterrupt):
        while server.wait_for_termination(timeout=1) and os.getppid() == engine:
            pass
    # An ordinary exit would wait for a call that hangs.
    os._exit(0)


def _engine_log(address: str) -> Log:
    engine = engine_pb2_grpc.EngineStub(grpc.insecure_channel(address, options=_OPTIONS))

    def log(message: str, urn: str, severity: str, ephemeral: bool) -> None:
        line = engine_pb2.LogRequest(
            message=message,
            urn=urn,
            severity=engine_pb2.LogSeverity.Value(severity),
            ephemeral=ephemeral,
        )
        # A line that cannot be shown is no reason to fail the step.
        with suppress(grpc.RpcError):
            engine.Log(line)

    return log
