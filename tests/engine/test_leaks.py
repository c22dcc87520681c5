"""No secret is in the clear anywhere but in the cluster, at Cloudflare and in the host's files.

One stack has a canary in every source that a secret can come from, and goes through its life:
previewed, brought up past two failures, rotated, refreshed, destroyed. `Story.seen` is all that a
person, a log collector or a backup of the state got to see of that. The core of a canary is letters
and digits, which no quoting of URL, JSON, YAML or shell changes; it is looked for as it is, in
hexadecimal, in base64, once and twice over, percent-encoded, and in all that gzip has compressed.
"""

import base64
import gzip
import hashlib
import json
import os
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
import yaml

from rehearsal.run import CHECKOUT, Rehearsal, Run, Secret

pytestmark = pytest.mark.engine

ID = "0123456789abcdef0123456789abcdef"
FILES = "/run/agenix"


@dataclass(frozen=True)
class Canaries:
    """One value for each source of a secret; another generation is all of them rotated."""

    generation: str

    def core(self, source: str) -> str:
        """What to look for: 40 letters and digits."""
        digest = hashlib.sha256(f"{source} {self.generation}".encode()).hexdigest()
        return f"Canary{digest[:34]}"

    def tunnel(self, source: str) -> str:
        # A tunnel's secret is base64, and without padding that is letters and digits too.
        return base64.b64encode(self.core(source)[:36].encode()).decode()

    def config(self, **rest: Any) -> dict[str, Any]:
        """A stack with each config secret and each file source."""
        connector = {"image": "cloudflare/cloudflared:2025.8.1"}
        web = {"hostname": "a.example.org", "service": "http://web.apps.svc:80"}
        local = {"hostname": "b.example.org", "service": "http://localhost:80"}
        cluster = {"image": "rancher/k3s:v1.31.5-k3s1", "delete": rest.get("delete")}
        return {
            "cluster": {key: value for key, value in cluster.items() if value},
            "secrets": {
                "apps": {
                    "values": {
                        # With what URL, JSON, YAML and a shell write in another way.
                        "data": {"password": Secret(self.core("data") + "\"'<é> %&$\n")},
                        "files": {"token": f"{FILES}/token"},
                    },
                    "whole": {
                        "manifest": f"{FILES}/whole",
                        "copies": [{"namespace": "others", "name": "whole"}],
                    },
                    "registry": {
                        "type": "kubernetes.io/dockerconfigjson",
                        "manifest": f"{FILES}/registry",
                    },
                    "seed": {"manifest": f"{FILES}/seed", "seedOnly": True},
                    "read-here": {"manifest": f"{FILES}/read-here", "readOn": "here"},
                }
            },
            "cloudflare": {
                "accountId": ID,
                "apiToken": Secret(self.core("api token")),
                "zones": {"example.org": ID},
            },
            "tunnels": {
                "inside": {
                    "secret": Secret(self.tunnel("tunnel inside")),
                    "connector": {"kind": "cluster", "namespace": "apps", **connector},
                    "routes": [web],
                    **({"delete": "inside"} if "delete" in rest else {}),
                },
                "outside": {
                    "secret": Secret(self.tunnel("tunnel outside")),
                    "connector": {"kind": "host", **connector},
                    "routes": [local],
                    **({"delete": "outside"} if "delete" in rest else {}),
                },
            },
            "tailscale": {
                "authKey": {"file": f"{FILES}/tailscale"},
                "copies": ["apps"],
                "operator": {
                    "clientId": Secret(self.core("client id")),
                    "clientSecret": Secret(self.core("client secret")),
                    "version": "1.86.2",
                },
            },
        }

    def write_files(self, machine: Path) -> None:
        """The decrypted files on the make-believe host."""

        def manifest(name: str, **content: Any) -> str:
            metadata = {"namespace": "apps", "name": name}
            return yaml.safe_dump({"kind": "Secret", "metadata": metadata, **content})

        auth = {"auth": _base64(f"user:{self.core('registry')}")}
        registry = json.dumps({"auths": {"registry.example.org": auth}})
        files = {
            "token": self.core("value file") + "\n",
            "tailscale": f"tskey-auth-{self.core('tailscale')}\n",
            "whole": manifest(
                "whole",
                data={"a": _base64(self.core("manifest data"))},
                stringData={"b": self.core("manifest string")},
            ),
            "registry": manifest(
                "registry",
                type="kubernetes.io/dockerconfigjson",
                data={".dockerconfigjson": _base64(registry)},
            ),
            "seed": manifest("seed", stringData={"a": self.core("seed")}),
            "read-here": manifest("read-here", stringData={"a": self.core("read here")}),
        }
        for name, content in files.items():
            path = machine / "files" / FILES.lstrip("/") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    def needles(self) -> dict[str, str]:
        """What to look for, by source."""
        plain = ["api token", "client id", "client secret", "data", "value file", "tailscale"]
        plain += ["manifest data", "manifest string", "registry", "seed", "read here"]
        tunnels = ("tunnel inside", "tunnel outside")
        found = {source: self.core(source) for source in plain}
        found |= {source: self.tunnel(source) for source in tunnels}
        # The bytes that a tunnel's secret stands for.
        return found | {f"{source}, decoded": self.core(source)[:36] for source in tunnels}


@dataclass
class Story:
    """What a stack's life let others see, as texts by where they stood."""

    rehearsal: Rehearsal
    needles: dict[str, str]
    seen: dict[str, bytes] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    processes: set[str] = field(default_factory=set)
    environments: dict[str, bytes] = field(default_factory=dict)
    found_in_world: set[str] = field(default_factory=set)
    debug_log: str = ""

    def see(self, name: str, run: Run) -> None:
        self.runs[name] = run
        self.seen[f"output of {name}"] = f"{run.stdout}\0{run.stderr}".encode()

    def see_files(self, when: str) -> None:
        """All files of the rehearsal but those of its world: state, history, backups, event logs,
        stack file, saved plan, temporary files.
        """
        for path in self.rehearsal.directory.rglob("*"):
            relative = path.relative_to(self.rehearsal.directory)
            if path.is_file() and relative.parts[0] != "world":
                self.seen[f"{relative} {when}"] = path.read_bytes()

    def watch(self, name: str) -> None:
        """An `up`, with the command line of each of its processes."""
        log = self.rehearsal.directory / "events" / f"{name}.jsonl"
        process = self.rehearsal.start("up", "--yes", "--skip-preview", log=log)
        ended = threading.Event()
        watcher = threading.Thread(target=self._note_processes, args=[process.pid, ended])
        watcher.start()
        stdout, stderr = process.communicate()
        ended.set()
        watcher.join()
        self.see(name, Run(("up",), process.returncode, stdout, stderr, 0, log))
        self.seen[f"command lines of {name}"] = "\n".join(self.processes).encode()
        # The language host gives the program its config there (PULUMI_CONFIG), and nobody else.
        self.seen |= {
            f"environment of {command}": environment
            for command, environment in self.environments.items()
            if "language-python-exec" not in command and "--program" not in command
        }

    def _note_processes(self, session: int, ended: threading.Event) -> None:
        while not ended.wait(0.005):
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit():
                    with suppress(OSError):
                        if os.getsid(int(entry.name)) == session:
                            command = (entry / "cmdline").read_bytes().decode()
                            self.processes.add(command)
                            self.environments[command] = (entry / "environ").read_bytes()


def lived(directory: Path) -> Story:
    """The whole life of a stack, with its secrets rotated in the middle."""
    (directory / "tmp").mkdir()
    first, second = Canaries("first"), Canaries("second")
    rehearsal = Rehearsal(
        directory, "dev", config=first.config(), environment={"TMPDIR": str(directory / "tmp")}
    )
    needles = {
        f"{source} ({canaries.generation})": needle
        for canaries in (first, second)
        for source, needle in canaries.needles().items()
    }
    story = Story(rehearsal, needles)
    machine = directory / "world" / "machine"
    first.write_files(machine)

    plan = str(directory / "plan.json")
    story.see("the first preview", rehearsal.preview("--diff", "--debug", "--save-plan", plan))
    fault = {"provider": "kubernetes", "method": "Create", "urn": "*::apps/whole", "do": "fail"}
    rehearsal.set_faults([fault])
    (machine / "missing-tools.json").write_text('["kubectl"]')
    story.see("an up that fails", rehearsal.up("--continue-on-error", check=False))
    (machine / "missing-tools.json").unlink()
    story.watch("the first up")
    story.see_files("after the first up")

    second.write_files(machine)
    rehearsal.set_config(second.config())
    story.see("the preview of a rotation", rehearsal.preview("--refresh", "--json"))
    story.see("the rotation", rehearsal.up("--diff"))
    story.see("refresh", rehearsal.refresh("--diff", "--debug"))
    for command in (["stack", "export"], ["stack", "output", "--json"], ["config"]):
        story.see(" ".join(command), rehearsal.pulumi(*command))
    cluster_file = machine / "clusters" / "factory.json"
    cluster = json.loads(cluster_file.read_text())
    story.needles["client key of the kubeconfig"] = cluster["key"][60:100]
    # Read by the preview itself, before any command has printed it.
    cluster["key"] = base64.b64encode(hashlib.sha512(b"rotated").digest() * 3).decode()
    story.needles["rotated client key of the kubeconfig"] = cluster["key"][60:100]
    cluster_file.write_text(json.dumps(cluster))
    story.see(
        "the preview of a rotated key",
        rehearsal.preview("--diff", "--debug", "--save-plan", plan),
    )
    world = {str(path): path.read_bytes() for path in (directory / "world").rglob("*.json")}
    story.found_in_world = {source for source, _ in found(needles, world)}

    rehearsal.set_config(second.config(delete="factory"))
    confirmed = rehearsal.up("--debug", "-v=9", "--logtostderr", "--logflow")
    story.see("the confirmation of destroy", replace(confirmed, stderr=""))
    story.debug_log = confirmed.stderr
    story.see("destroy", rehearsal.destroy("--debug"))
    story.see_files("after destroy")
    return story


def test_no_secret_is_seen_anywhere_in_the_life_of_a_stack(tmp_path):
    story = lived(tmp_path)
    assert found(story.needles, story.seen) == []
    check_that_it_went_as_meant(story)
    check_that_the_search_finds_canaries_where_they_belong(story)
    check_that_all_is_searched_that_a_stack_leaves(story)
    check_that_a_debug_log_shows_them_only_in_the_engines_own_messages(story)


def check_that_it_went_as_meant(story: Story) -> None:
    failed = [name for name, run in story.runs.items() if run.code]
    assert failed == ["an up that fails"]
    errors = story.runs["an up that fails"].stdout
    assert "Create failed, as faults.json says" in errors
    assert 'running "/var/lib/homelab/hostctl secret seed"' in errors
    rotated = {step.urn for step in story.runs["the rotation"].steps if step.op.value == "update"}
    assert any(urn.endswith("::apps/whole") for urn in rotated)
    assert any(urn.endswith("::inside") for urn in rotated)
    assert story.runs["the preview of a rotated key"].changes == {"update": 2}


def check_that_the_search_finds_canaries_where_they_belong(story: Story) -> None:
    # The seed is written once, and the API token is in nobody's object.
    rotated = {source for source in story.needles if source.endswith("(second)")}
    expected = rotated - {"api token (second)", "seed (second)"} | {"seed (first)"}
    assert expected <= story.found_in_world


def check_that_all_is_searched_that_a_stack_leaves(story: Story) -> None:
    places = " ".join(story.seen)
    for place in (".pulumi/stacks", ".pulumi/history", ".pulumi/backups", "events/", "plan.json"):
        assert place in places
    running = " ".join(story.processes)
    for program in ("pulumi\0up", "language-python", "providers.command", "providers.docker"):
        assert program in running
    assert any("providers.command" in name for name in story.seen if "environment" in name)
    assert "ciphertext" in story.seen["output of stack export"].decode()


def check_that_a_debug_log_shows_them_only_in_the_engines_own_messages(story: Story) -> None:
    """`-v=9 --logtostderr` is no leak of ours, nor one to be closed here: at that level the engine
    prints each property that it sends to a plugin or gets from a program, without its secret mark.
    Such a log is as secret as what it is about.
    """
    lines = {str(n): line.encode() for n, line in enumerate(story.debug_log.split("\n"))}
    leaks = {place for _, place in found(story.needles, lines)}
    assert leaks
    of_engine = re.compile(rb'"msg":"(Unm|M)arshaling property for RPC\[')
    assert [lines[place][:200] for place in leaks if not of_engine.search(lines[place])] == []


def test_files_that_cannot_be_used_are_named_and_their_content_is_not_shown(tmp_path):
    canary = Canaries("broken").core("file")
    head = "kind: Secret\nmetadata: {namespace: apps, name: NAME}\n"
    broken = {
        "no-yaml": f"{head}stringData: {{a: {canary}",
        "no-manifest": canary,
        "two-documents": f"{head}stringData: {{a: {canary}}}\n---\n{canary}: {canary}\n",
        "another-name": f"{head}stringData: {{a: {canary}}}\n".replace("NAME", "another"),
        "no-base64": f"{head}data: {{a: '%{canary}'}}\n",
        "a-number": f"{head}stringData: {{a: {int(canary[6:], 16)}, b: {canary}}}\n",
        "no-data": f"{head}{canary}: {canary}\n",
    }
    secrets = {name: {"manifest": f"{FILES}/{name}"} for name in broken}
    config = {
        "cluster": {"image": "rancher/k3s:v1.31.5-k3s1"},
        "secrets": {"apps": secrets},
        "tailscale": {"authKey": {"file": f"{FILES}/tailscale"}},
    }
    rehearsal = Rehearsal(tmp_path, "dev", config=config)
    files = tmp_path / "world" / "machine" / "files" / FILES.lstrip("/")
    files.mkdir(parents=True)
    for name, content in broken.items():
        (files / name).write_text(content.replace("NAME", name))
    (files / "tailscale").write_text(f'{{"client": "{canary}"}}')
    story = Story(rehearsal, {"file": canary, "number": str(int(canary[6:], 16))})
    story.see("preview", rehearsal.preview("--debug", check=False))
    story.see_files("after it")
    assert story.runs["preview"].code != 0
    error = story.runs["preview"].stdout
    assert [name for name in [*broken, "tailscale"] if f"{FILES}/{name}" not in error] == []
    assert found(story.needles, story.seen) == []


def test_what_is_encoded_or_compressed_is_found():
    needle = Canaries("form").core("a form")
    packed = gzip.compress(f'{{"a": "{needle}"}}'.encode())
    places = {
        "as it is": f"x{needle}y".encode(),
        "base64": base64.b64encode(f"ab{needle}".encode()),
        "gzip": b"junk" + packed + b"junk",
        "base64 of gzip": b"x=" + base64.b64encode(packed) + b";",
        "percent": "".join(f"%{ord(c):02X}" for c in needle).encode(),
        "nowhere": b"x" * 100,
    }
    assert {place for _, place in found({"": needle}, places)} == places.keys() - {"nowhere"}


_CRASH = """
import homelab
def crash(*given, **outputs):
    raise RuntimeError("the program has crashed")
homelab.export = crash
"""


def test_neither_a_program_that_crashes_nor_a_provider_that_repeats_its_inputs_shows_a_secret(
    tmp_path,
):
    canaries = Canaries("crash")
    (tmp_path / "sitecustomize.py").write_text(_CRASH)
    rehearsal = Rehearsal(tmp_path / "rehearsal", "dev", config=canaries.config())
    canaries.write_files(rehearsal.directory / "world" / "machine")
    token = canaries.core("api token")
    fault = {"provider": "cloudflare", "method": "Create", "do": "fail"}
    rehearsal.set_faults([{**fault, "message": f"403 Forbidden: Authorization: Bearer {token}"}])
    story = Story(rehearsal, canaries.needles())
    story.see("a provider's failure", rehearsal.up("--continue-on-error", check=False))
    rehearsal.set_faults([])
    # The token is sent to Cloudflare's API by the program itself.
    rehearsal.set_token({"GET user/tokens": 200, "GET zones/*": 503, "GET accounts/*": 403})
    story.see("a token that is refused", rehearsal.preview("--debug", check=False))
    assert "permission(s) that this stack needs" in story.runs["a token that is refused"].stdout
    rehearsal.set_token({})
    rehearsal.environment = {"PYTHONPATH": f"{tmp_path}:{CHECKOUT}"}
    story.see("a crash", rehearsal.preview("--debug", check=False))
    story.see_files("after it")
    assert "403 Forbidden" in story.runs["a provider's failure"].stdout
    crash = story.runs["a crash"]
    assert "the program has crashed" in crash.stdout + crash.stderr
    assert found(story.needles, story.seen) == []


def found(needles: dict[str, str], places: dict[str, bytes]) -> list[tuple[str, str]]:
    """Each needle and place where it is found in some form."""
    forms = {source: _forms(needle.encode()) for source, needle in needles.items()}
    return [
        (source, place)
        for place, content in places.items()
        for readable in [b"\0".join(_readings(content))]
        for source, texts in forms.items()
        if any(text in readable for text in texts)
    ]


def _readings(content: bytes) -> Iterator[bytes]:
    """The content, and what it is without percent-encoding and compression."""
    yield content
    if b"%" in content:
        yield unquote_to_bytes(content)
    packed = [content[start.start() :] for start in re.finditer(rb"\x1f\x8b\x08", content)]
    # "H4sI" is base64 of gzip's first bytes.
    for text in re.findall(rb"H4sI[A-Za-z0-9+/]+", content):
        packed.append(base64.b64decode(text[: len(text) // 4 * 4]))
    for one in packed:
        with suppress(zlib.error):
            yield zlib.decompressobj(31).decompress(one)


def _forms(needle: bytes) -> list[bytes]:
    once = _in_base64(needle)
    return [
        needle,
        needle.hex().encode(),
        *once,
        *(text for one in once for text in _in_base64(one)),
    ]


def _in_base64(needle: bytes) -> list[bytes]:
    """What is the same of it in base64 whatever stands around it, for each of three offsets."""
    texts = []
    for before in range(3):
        whole = (len(needle) - (3 - before) % 3) // 3 * 3
        start = (3 - before) % 3
        texts.append(base64.b64encode(needle[start : start + whole]))
    return texts


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
