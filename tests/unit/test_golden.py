"""The stand-ins answer as the official plugins did: recordings replayed request by request.

`tests/golden` holds what the official plugins answered (its README tells how it was recorded). Each
recording is replayed against the stand-ins in this process, on a world in which the recordings
before it were replayed. Where a stand-in differs on purpose, the table in
`rehearsal/DIFFERENCES.md` says so; a row that nothing needs any more fails.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from rehearsal import core

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
DIFFERENCES = ROOT / "rehearsal" / "DIFFERENCES.md"

RECORDINGS = {
    "command": [
        "preview1",
        "up1",
        "up1-again",
        "preview2",
        "up2",
        "up2-again",
        "up9-fails",
        "refresh",
        "destroy",
    ],
    "docker": [
        "preview1",
        "up1",
        "up1-again",
        "preview2",
        "up2",
        "preview3-unreachable",
        "refresh",
        "destroy",
    ],
    "cloudflare": [
        "preview1",
        "up1",
        "up1-again",
        "preview2",
        "up2",
        "up2-again",
        "preview3",
        "up3",
        "up3-again",
        "refresh3",
        "destroy",
    ],
    "kubernetes": [
        "preview1",
        "up1",
        "up1-again",
        "preview2",
        "up2",
        "preview3-user",
        "up3-user",
        "preview4-server",
        "preview5-identity",
        "preview6-exists",
        "up6-exists",
        "preview7-invalid",
    ],
}
"""Every recording, by package, in the order in which they were made."""

VOLATILE = {
    "command": ["id"],
    "docker": ["id", "properties.id", "properties.hostname"],
    "cloudflare": ["id", "properties.id"],
    "kubernetes": [
        "id",
        "properties.__fieldManager",
        "properties.metadata.uid",
        "properties.metadata.resourceVersion",
        "properties.spec.clusterIP",
    ],
}
"""Paths in responses where a value is generated: later requests get the stand-in's own value."""

GIVEN = {
    "cloudflare": {
        "bmV3c2VjcmV0bmV3c2VjcmV0bmV3c2VjcmV0bmV3cw==": (
            "bmV3c2VjcmV0bmV3c2VjcmV0bmV3c2VjcmV0bmV3c2U="
        )
    }
}
"""Recorded inputs that are replayed as another one: a tunnel secret of 31 bytes, of which the API
that the recordings were made against took no notice, as one of 32."""

OWNERS = {("kubernetes", "mutable"): "mutable", ("kubernetes", "config"): "mutable"}
"""The provider resource of a resource, by package and name, where a program has two providers."""


def _unreachable(directory: Path) -> None:
    (directory / "world" / "docker" / "unreachable").touch()


def _reachable(directory: Path) -> None:
    (directory / "world" / "docker" / "unreachable").unlink()


def _existing_secret(directory: Path) -> None:
    (there,) = (directory / "world" / "kubernetes").glob("*/gold/Secret*/plain.json")
    secret = json.loads(there.read_text())
    secret["metadata"]["name"] = "exists"
    there.with_name("exists.json").write_text(json.dumps(secret))


BEFORE: dict[tuple[str, str], Callable[[Path], None]] = {
    ("docker", "preview3-unreachable"): _unreachable,
    ("docker", "refresh"): _reachable,
    ("kubernetes", "preview6-exists"): _existing_secret,
}
"""What happened to the world before a recording was made, besides the recordings before it."""


@dataclass(frozen=True)
class Difference:
    """A row of the table of differences on purpose: what may differ, by patterns."""

    package: str
    method: str
    path: str

    def covers(self, mismatch: Mismatch) -> bool:
        return (
            self.package == mismatch.package
            and fnmatch.fnmatchcase(mismatch.method, self.method)
            and fnmatch.fnmatchcase(mismatch.path, self.path)
        )


@dataclass(frozen=True)
class Mismatch:
    """Where a stand-in answered something else than the official plugin."""

    package: str
    method: str
    path: str
    official: str
    stand_in: str
    request: str

    def __str__(self) -> str:
        return (
            f"{self.method} {self.request}: {self.path}\n"
            f"  official: {self.official}\n  stand-in: {self.stand_in}"
        )


def differences() -> list[Difference]:
    """The rows `| package | method | path | reason |` of the table."""
    rows = re.findall(
        r"^\| (\w+) \| `([^`]+)` \| `([^`]+)` \| \S.* \|$", DIFFERENCES.read_text(), re.M
    )
    return [Difference(*row) for row in rows]


ABSENT = "(absent)"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@dataclass
class Replay:
    """The stand-ins of one package's recordings, on one world."""

    package: str
    directory: Path
    instances: dict[str, Any] = field(default_factory=dict)
    opened: list[tuple[grpc.Channel, grpc.Server]] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    """What stands here for a recorded value: above all what the stand-in generated."""

    def play(self, name: str) -> list[Mismatch]:
        """Replay one recording. Returns where the answers differ."""
        BEFORE.get((self.package, name), lambda directory: None)(self.directory)
        found = []
        for line in (GOLDEN / self.package / f"{name}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if self._is_replayed(entry):
                found.extend(self._call(entry))
        return found

    def close(self) -> None:
        for channel, server in self.opened:
            channel.close()
            server.stop(grace=None)

    def _is_replayed(self, entry: dict[str, Any]) -> bool:
        # The engine gave up, or its run was cut short: no answer of the plugin.
        cut_short = ("code = Canceled", "desc = context canceled")
        if any(text in error for error in entry.get("errors", []) for text in cut_short):
            return False
        # Commands in another package's recordings ran on the machine of the recording.
        request = entry["request"]
        token = request.get("type", request.get("tok", ""))
        foreign = token.removeprefix("pulumi:providers:").startswith("command")
        handshake = entry["method"] == "Handshake" and "response" in entry
        return self.package == "command" or not (foreign or handshake)

    def _stub(self, method: str, request: dict[str, Any]) -> Any:
        is_provider = request.get("type", "").startswith("pulumi:providers:")
        name = request.get("name", "")
        if not is_provider:
            name = OWNERS.get((self.package, name), "")
        elif (self.package, name) not in OWNERS:
            name = ""
        if method == "CheckConfig" or name not in self.instances:
            module = importlib.import_module(f"rehearsal.providers.{self.package}")
            server, port = core.listen(getattr(module, self.package.title())(self.directory))
            channel = grpc.insecure_channel(f"127.0.0.1:{port}")
            self.opened.append((channel, server))
            self.instances[name] = core.provider_pb2_grpc.ResourceProviderStub(channel)
        return self.instances[name]

    def _call(self, entry: dict[str, Any]) -> Iterator[Mismatch]:
        method = entry["method"]
        request = entry["request"]
        call = getattr(self._stub(method, request), method)
        message = json_format.ParseDict(self._own(request), _request_type(method)())
        try:
            answer = json_format.MessageToDict(call(message))
            error = ABSENT
        except grpc.RpcError as failed:
            answer = {}
            code = failed.code().value[1].title().replace(" ", "")
            error = f"rpc error: code = {code} desc = {failed.details()}"
        about = request.get("urn", request.get("tok", "")).rpartition("::")[2]
        if request.get("preview"):
            about += " (preview)"
        official_error = self._own(entry.get("errors", [ABSENT])[0])
        compared = [("errors", official_error, error)] if official_error != error else []
        compared += self._compare("", entry.get("response") or {}, answer)
        for path, official, own in compared:
            yield Mismatch(self.package, method, path, repr(official), repr(own), about)

    def _own(self, value: Any) -> Any:
        """A recorded value with the values that this stand-in generated."""
        if isinstance(value, dict):
            return {key: self._own(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._own(item) for item in value]
        if isinstance(value, str) and value in self.values:
            return self.values[value]
        if isinstance(value, str):
            for official, own in self.values.items():
                # A short one, such as a resource version, may be in another by chance.
                if len(official) >= 8:
                    value = value.replace(official, own)
        return value

    def _compare(self, path: str, official: Any, own: Any) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(official, dict) and isinstance(own, dict):
            for key in {**official, **own}:
                step = f"{path}.{key}" if path else key
                yield from self._compare(step, official.get(key, ABSENT), own.get(key, ABSENT))
        elif isinstance(official, list) and isinstance(own, list) and len(official) == len(own):
            for index, pair in enumerate(zip(official, own, strict=True)):
                yield from self._compare(f"{path}.{index}", *pair)
        elif self._own(official) != own:
            if TIME.fullmatch(str(official)) and TIME.fullmatch(str(own)):
                return
            if (
                isinstance(official, str)
                and isinstance(own, str)
                and ABSENT not in (official, own)
                and official not in self.values
                and any(fnmatch.fnmatchcase(path, p) for p in VOLATILE[self.package])
            ):
                self.values[official] = own
            else:
                yield path, official, own


def _request_type(method: str) -> Any:
    name = {
        "Handshake": "ProviderHandshakeRequest",
        "CheckConfig": "CheckRequest",
        "DiffConfig": "DiffRequest",
    }.get(method, f"{method}Request")
    return getattr(core.provider_pb2, name)


@pytest.fixture
def replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Replay]]:
    """Makes replays, each in a rehearsal of its own; commands really run there."""
    made: list[Replay] = []

    def make(package: str) -> Replay:
        monkeypatch.setenv(core.REALLY, "1" if package == "command" else "")
        directory = tmp_path / package
        (directory / "world" / package).mkdir(parents=True)
        made.append(Replay(package, directory, values=dict(GIVEN.get(package, {}))))
        return made[-1]

    yield make
    for replay in made:
        replay.close()


def test_every_recording_is_replayed():
    files = {(path.parent.name, path.stem) for path in GOLDEN.glob("*/*.jsonl")}
    assert files == {(package, name) for package, names in RECORDINGS.items() for name in names}


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package, names in RECORDINGS.items() for name in names],
    ids=lambda value: value,
)
def test_stand_in_answers_as_the_official_plugin(
    package: str, name: str, replays: Callable[[str], Replay]
):
    replay = replays(package)
    names = RECORDINGS[package]
    for earlier in names[: names.index(name)]:
        replay.play(earlier)
    mismatches = [
        mismatch
        for mismatch in replay.play(name)
        if not any(difference.covers(mismatch) for difference in differences())
    ]
    assert not mismatches, "\n".join(map(str, mismatches))


@pytest.mark.parametrize("package", RECORDINGS)
def test_every_difference_on_purpose_is_needed(package: str, replays: Callable[[str], Replay]):
    replay = replays(package)
    mismatches = [mismatch for name in RECORDINGS[package] for mismatch in replay.play(name)]
    unused = [
        difference
        for difference in differences()
        if difference.package == package and not any(map(difference.covers, mismatches))
    ]
    assert not unused
