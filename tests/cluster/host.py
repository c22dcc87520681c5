"""hostctl on the host of an engine: run to its end, or beside the test."""

import json
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from typing import Any

from hostctl import program
from tests.cluster.engine import Engine
from tests.cluster.mutants import mutated


class Host:
    """hostctl as a person runs it on the host of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.program = engine.root / "hostctl.py"
        self.program.write_text(mutated(program.text()))
        self.said = ""

    def scale(self, **constants: float) -> None:
        """Gives constants of hostctl other values, so that what takes minutes takes seconds."""
        text = self.program.read_text()
        for name, value in constants.items():
            text, found = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.M)
            assert found == 1, name
        self.program.write_text(text)

    def argv(self, *verb: str) -> list[str]:
        """The command line of a verb: host.argv("k3d", "ensure")."""
        return [sys.executable, str(self.program), *verb]

    def __call__(self, *verb: str, spec: dict[str, Any], **options: Any) -> dict[str, Any]:
        """The result of a verb; what it said meanwhile is in `said`."""
        done = self.engine.run(self.argv(*verb), input=json.dumps(spec), check=False, **options)
        self.said = done.stderr
        try:
            return json.loads(done.stdout)
        except ValueError:
            raise AssertionError(f"hostctl {verb}: {done.stdout!r}\n{done.stderr}") from None

    def done(self, *verb: str, spec: dict[str, Any], **options: Any) -> dict[str, Any]:
        """The result of a verb that must succeed."""
        result = self(*verb, spec=spec, **options)
        assert result["ok"], f"{result['error']}\n{self.said}"
        return result

    def begin(self, *verb: str, spec: dict[str, Any]) -> "Running":
        """Begins a verb that the test goes on beside."""
        return Running(self, verb, spec)

    def pipe(self, argv: list[str], into: list[str]) -> None:
        """Runs a program with another one's output."""
        self.engine.run(["sh", "-c", f"{shlex.join(argv)} | {shlex.join(into)}"])

    def kubectl(self, *words: str, node: str = "k3d-factory-server-0", input: str = "") -> str:
        """What kubectl in a node prints."""
        return self.engine.docker("exec", "-i", node, "kubectl", *words, input=input)


class Running:
    """A verb under way; killed at the end of its block if it still runs."""

    def __init__(self, host: Host, verb: tuple[str, ...], spec: dict[str, Any]) -> None:
        pipe = subprocess.PIPE
        self._child = host.engine.popen(host.argv(*verb), stdin=pipe, stdout=pipe, stderr=pipe)
        assert self._child.stdin
        self._child.stdin.write(json.dumps(spec).encode())
        self._child.stdin.close()
        self._said: queue.Queue[str] = queue.Queue()
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._reader.join()
        for pipe in (self._child.stdout, self._child.stderr):
            if pipe:
                pipe.close()

    def _read(self) -> None:
        assert self._child.stderr
        for line in self._child.stderr:
            self._said.put(line.decode())

    def says(self, text: str, seconds: float = 60) -> None:
        """Waits until it reports this."""
        until = time.monotonic() + seconds
        while not any(text in line for line in self.lines):
            try:
                self.lines.append(self._said.get(timeout=max(0, until - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"never said {text!r}: {''.join(self.lines)}") from None

    def result(self, seconds: float = 300) -> dict[str, Any]:
        """Waits for its end and returns the result."""
        assert self._child.stdout
        self._child.wait(seconds)
        return json.loads(self._child.stdout.read())

    def kill(self) -> None:
        """kill -9 of hostctl alone; what it started goes on."""
        self._child.kill()
        self._child.wait()
