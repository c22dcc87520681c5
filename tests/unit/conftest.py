"""Runs a component under Pulumi's mocks and shows everything that it registered.

Pulumi's own mocks hand a test the inputs only. The monitor here keeps the whole registration, so
that a test can assert what protects, orders and hides a resource: parent, protect, deletedWith,
ignoreChanges, import id, secret marks.

    def test_a_tunnel_is_protected(run_program):
        registered = run_program(lambda: CloudflareTunnel("factory", args()))
        assert registered["ZeroTrustTunnelCloudflared", "factory"].protect
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pulumi
import pytest
from google.protobuf import json_format
from pulumi.runtime import mocks, rpc

Key: TypeAlias = tuple[str, str]
"""Last part of the type token and logical name: ("DnsRecord", "argocd.example.org")."""

Outputs: TypeAlias = Mapping[str, Any] | Callable[[mocks.MockResourceArgs], Mapping[str, Any]]
"""What a resource answers on top of its inputs. ``id`` is its id; by default `<name>-id`."""

Answer: TypeAlias = Mapping[str, Any] | Callable[[mocks.MockCallArgs], Mapping[str, Any]]
"""What an invoke answers."""

UNKNOWN = rpc.UNKNOWN
"""An input that a preview does not know yet."""


@dataclass(frozen=True)
class Registration:
    """One resource as the engine was asked to register it.

    ``inputs`` are plain; ``secrets`` holds the path of each secret one (`data`,
    `config.ingresses[0].service`). ``depends_on`` also has what the inputs depend on, as the engine
    sees it. ``outputs`` are those of `register_outputs`, None when it was not called.
    """

    type: str
    name: str
    custom: bool
    parent: Key | None
    inputs: dict[str, Any]
    secrets: set[str]
    depends_on: set[Key]
    provider: str
    """Logical name of the explicit provider, empty for the default one."""
    protect: bool
    deleted_with: Key | None
    ignore_changes: list[str]
    import_id: str
    delete_before_replace: bool
    retain_on_delete: bool
    additional_secret_outputs: list[str]
    timeouts: dict[str, str]
    aliases: list[dict[str, Any]]
    outputs: dict[str, Any] | None = None
    secret_outputs: set[str] = field(default_factory=set)


class Registered(Mapping[Key, Registration]):
    """All that a program registered, in the order of registration."""

    def __init__(self, resources: Mapping[Key, Registration]) -> None:
        self._resources = dict(resources)

    def __getitem__(self, key: Key) -> Registration:
        return self._resources[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._resources)

    def __len__(self) -> int:
        return len(self._resources)

    def names(self, kind: str) -> list[str]:
        """The logical names of all resources of a kind, such as `DnsRecord`."""
        return [name for type_, name in self if type_ == kind]


class _Mocks(mocks.Mocks):
    def __init__(self, outputs: Mapping[str, Outputs], calls: Mapping[str, Answer]) -> None:
        self._outputs = outputs
        self._calls = calls

    def new_resource(self, args: mocks.MockResourceArgs) -> tuple[str | None, dict]:
        given = self._outputs.get(_kind(args.typ), {})
        state = {**args.inputs, **(given(args) if callable(given) else given)}
        return state.pop("id", f"{args.name}-id"), state

    def call(self, args: mocks.MockCallArgs) -> tuple[dict, list[tuple[str, str]] | None]:
        if args.token not in self._calls:
            raise LookupError(f"{args.token} was invoked; the test gives no answer to it")
        answer = self._calls[args.token]
        return dict(answer(args) if callable(answer) else answer), []


class _Monitor(mocks.MockMonitor):
    """Pulumi's mock monitor, which keeps each request."""

    def __init__(self, answers: _Mocks) -> None:
        super().__init__(answers)
        self._requests: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}

    def RegisterResource(self, request: Any) -> Any:
        urn = self.make_urn(request.parent, request.type, request.name)
        if request.type != "pulumi:pulumi:Stack":
            if urn in self._requests:
                raise ValueError(f"registered twice: {urn}")
            self._requests[urn] = request
        return super().RegisterResource(request)

    def RegisterResourceOutputs(self, request: Any) -> Any:
        self._outputs[request.urn] = request.outputs
        return super().RegisterResourceOutputs(request)

    def run(self, program: Callable[[], Any], *, stack: str = "test", preview: bool) -> None:
        """Runs a program until all that it started has ended, in an event loop and under a root
        stack of its own. Raises what the program raises."""
        loops: list[asyncio.AbstractEventLoop] = []

        def begin() -> None:
            # Else the mocks make one in each thread that asks the monitor, and never close it.
            loops.append(asyncio.new_event_loop())
            asyncio.set_event_loop(loops[-1])

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.set_default_executor(ThreadPoolExecutor(initializer=begin))
            mocks.set_mocks(
                self.mocks,
                project="homelab",
                stack=stack,
                preview=preview,
                monitor=self,
                logger=logging.getLogger("pulumi"),
            )
            try:
                pulumi.runtime.test(program)()
            except BaseException:
                # It is what the outputs hold that nobody awaits any more. Each would be logged when
                # it is collected: in another test, at any of its lines.
                loop.set_exception_handler(lambda *_: None)
                raise

        try:
            asyncio.run(main())
        finally:
            for loop in loops:
                loop.close()

    def registered(self) -> Registered:
        resources: dict[Key, Registration] = {}
        for urn, request in self._requests.items():
            key = _key(urn)
            assert key is not None
            assert key not in resources, f"two resources are {key}: {urn}"
            inputs, secrets = _plain(request.object)
            outputs, secret_outputs = _plain(self._outputs.get(urn))
            resources[key] = Registration(
                type=request.type,
                name=request.name,
                custom=request.custom,
                parent=_key(request.parent),
                inputs=inputs,
                secrets=secrets,
                depends_on=set(filter(None, map(_key, request.dependencies))),
                provider=(_key(request.provider.rpartition("::")[0]) or ("", ""))[1],
                protect=request.protect,
                deleted_with=_key(request.deletedWith),
                ignore_changes=list(request.ignoreChanges),
                import_id=request.importId,
                delete_before_replace=request.deleteBeforeReplace,
                retain_on_delete=request.retainOnDelete,
                additional_secret_outputs=list(request.additionalSecretOutputs),
                timeouts=json_format.MessageToDict(request.customTimeouts),
                aliases=[json_format.MessageToDict(alias) for alias in request.aliases],
                outputs=outputs if urn in self._outputs else None,
                secret_outputs=secret_outputs,
            )
        return Registered(resources)


@pytest.fixture
def run_program() -> Callable[..., Registered]:
    """Runs a function as a Pulumi program, waits for all it started, returns what it registered.

    ``outputs`` says by kind (`Command`) what resources answer, ``calls`` by token what invokes do.
    In a ``preview`` outputs that are neither inputs nor given are unknown. What the program logs is
    in pytest's `caplog`.
    """

    def run(
        program: Callable[[], Any],
        *,
        outputs: Mapping[str, Outputs] | None = None,
        calls: Mapping[str, Answer] | None = None,
        preview: bool = False,
    ) -> Registered:
        monitor = _Monitor(_Mocks(outputs or {}, calls or {}))
        monitor.run(program, preview=preview)
        return monitor.registered()

    return run


def _kind(type_: str) -> str:
    return type_.rpartition(":")[2]


def _key(urn: str) -> Key | None:
    """None for no URN and for the stack, which is the parent of all that has no other."""
    if not urn:
        return None
    type_, name = urn.split("::", 3)[2:]
    return None if type_ == "pulumi:pulumi:Stack" else (_kind(type_), name)


def _plain(message: Any) -> tuple[dict[str, Any], set[str]]:
    """The values of a message without their secret marks, and the paths that were marked."""
    secrets: set[str] = set()

    def unwrap(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            if value.get(rpc._special_sig_key) == rpc._special_secret_sig:
                secrets.add(path)
                return unwrap(value["value"], path)
            return {
                key: unwrap(item, f"{path}.{key}" if path else key) for key, item in value.items()
            }
        if isinstance(value, list):
            return [unwrap(item, f"{path}[{index}]") for index, item in enumerate(value)]
        return value

    return unwrap(json_format.MessageToDict(message) if message is not None else {}, ""), secrets
