"""Stand-in for the command provider: `command:local:Command` and `command:local:run`.

In a rehearsal no command of the host runs. The command line is read as the few forms in which the
stack calls hostctl, and hostctl's own code runs in this process on a make-believe machine. With
HOMELAB_REHEARSAL_RUN=1 commands really run, through the shell, as the official plugin runs them.

The rules are those of pulumi-command, provider/pkg/provider/local.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shlex
import subprocess
import threading
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn

from rehearsal.core import (
    REALLY,
    UNKNOWN,
    Checked,
    Diff,
    Failure,
    Properties,
    Provider,
    Request,
    compare,
    plain,
    serve,
)
from rehearsal.schemas import Problem, Schema

if TYPE_CHECKING:
    from rehearsal.machine import RehearsalMachine

_VERSION_INPUT = "__pulumi-go-provider-version"


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended."""

    stdout: str
    stderr: str
    status: int = 0


class Command(Provider):
    """The command provider."""

    package = "command"
    schema = Schema("command")
    version = schema.version
    handshake: ClassVar[dict[str, bool] | None] = {
        "accept_secrets": True,
        "accept_resources": True,
        "accept_outputs": True,
        "accepts_byte_string": True,
    }
    configuration: ClassVar[dict[str, bool]] = {
        "acceptSecrets": True,
        "supportsPreview": True,
        "acceptResources": True,
        "acceptOutputs": True,
    }
    unimplemented = "{method} is not implemented"
    # The context of the command's process ends, which kills it (exec.CommandContext).
    expired = "signal: killed: running the command"

    def check_config(self, request: Request) -> Checked:
        return Checked({_VERSION_INPUT: "v1.5.0", **request.news})

    def check(self, request: Request) -> Checked:
        problems = self.schema.check_resource(request.type, request.news)
        return Checked(request.news, [_failure(problem, "Command") for problem in problems])

    def diff(self, request: Request) -> Diff:
        # Triggers show as an update here: the SDK's own replaceOnChanges makes a replacement of it.
        detailed = compare(request.old_inputs, request.news)
        top = {path.replace("[", ".").partition(".")[0] for path in detailed}
        return Diff(changes=bool(detailed), detailed=detailed, diffs=sorted(top))

    def create(self, request: Request) -> tuple[str, Properties]:
        id = request.name + secrets.token_hex(4)
        return id, self._step(request, request.news.get("create"), {})

    def update(self, request: Request) -> Properties:
        command = request.news.get("update")
        if command is None:
            command = request.news.get("create")
        return self._step(request, command, request.olds)

    def read(self, request: Request) -> tuple[str, Properties, Properties]:
        return request.id, request.olds, request.old_inputs

    def delete(self, request: Request) -> None:
        command = plain(request.olds.get("delete"))
        if command is not None:
            self._run(command, plain(request.olds), plain(request.olds), request.urn)

    def invoke(self, token: str, args: Properties, preview: bool) -> Properties:
        if token != "command:local:run":
            raise Failure(f"Invoke '{token}' not found", "NOT_FOUND")
        problems = self.schema.check_function(token, args)
        if problems:
            reasons = "; ".join(_failure(problem, "Run")[1] for problem in problems)
            raise Failure(reasons, "INVALID_ARGUMENT")
        given = plain(args)
        result = self._run(given["command"], given, {}, "")
        return {**args, "stdout": result.stdout, "stderr": result.stderr}

    def _step(self, request: Request, command: object, olds: Properties) -> Properties:
        outputs = {name: olds[name] for name in ("stdout", "stderr") if name in olds}
        if request.preview:
            return {**request.news, "stdout": UNKNOWN, "stderr": UNKNOWN}
        if command is None:
            return {**request.news, "stdout": "", "stderr": "", **outputs}
        result = self._run(str(plain(command)), plain(request.news), plain(outputs), request.urn)
        return {**request.news, "stdout": result.stdout, "stderr": result.stderr}

    def _run(self, command: str, inputs: Properties, before: Properties, urn: str) -> Result:
        """Run a command with the inputs' stdin, environment and so on. Raises if it fails.

        `before` holds what the run before this one wrote.
        """
        environment = dict(inputs.get("environment") or {})
        if inputs.get("addPreviousOutputInEnv") is not False:
            for name in ("stdout", "stderr"):
                if before.get(name):
                    environment["PULUMI_COMMAND_" + name.upper()] = before[name]
        stdin = inputs.get("stdin") or ""
        if os.environ.get(REALLY) == "1":
            interpreter = inputs.get("interpreter") or ["/bin/sh", "-c"]
            result = _really_run([*interpreter, command], stdin, environment, inputs.get("dir"))
        else:
            unsupported = {"interpreter", "dir", "assetPaths", "archivePaths"} & inputs.keys()
            if unsupported:
                raise Failure(f"a rehearsal runs no command with {', '.join(sorted(unsupported))}")
            line = command.removesuffix(" || true")
            result = _rehearse(line, stdin, self.directory)
            if line != command:
                result = replace(result, status=0)
        logging = inputs.get("logging") or "stdoutAndStderr"
        for stream, text in (("stdout", result.stdout), ("stderr", result.stderr)):
            if stream in logging.lower():
                for line in text.splitlines():
                    self.log(line, urn, ephemeral=True)
        if result.status:
            # %q of Go, for what a command line may hold, is a JSON string. The official plugin
            # tells both streams as they come, in no certain order.
            quoted = json.dumps(command, ensure_ascii=False)
            written = result.stderr + result.stdout
            raise Failure(f"exit status {result.status}: running {quoted}:\n{written}")
        return Result(result.stdout.removesuffix("\n"), result.stderr.removesuffix("\n"))


def _failure(problem: Problem, owner: str) -> tuple[str, str]:
    """A check failure in the wording of pulumi's mapper (sdk/go/common/util/mapper)."""
    name = problem.path
    if problem.kind == "missing":
        return name, f"Missing required field '{name}' on '{owner}'"
    if problem.kind == "unknown":
        return name, f"Unrecognized field '{name}' on '{owner}'"
    got = type(problem.value).__name__
    return name, f"Field '{name}' on '{owner}' must be a '{problem.detail}'; got '{got}' instead"


def _really_run(
    argv: list[str], stdin: str, environment: dict[str, str], directory: str | None
) -> Result:
    ran = subprocess.run(
        argv,
        input=stdin.encode(),
        capture_output=True,
        env={**os.environ, **environment},
        cwd=directory,
        check=False,
    )
    return Result(
        ran.stdout.decode(errors="replace"), ran.stderr.decode(errors="replace"), ran.returncode
    )


# The commands of a rehearsal


@dataclass(frozen=True, slots=True)
class Call:
    """A command line of the stack: what it does with hostctl on the host.

    `how`: `installed` runs the file at `path`; `shipped` brings the program along on stdin;
    `install` writes the program on stdin to `path`.
    """

    how: Literal["installed", "shipped", "install"]
    path: str = ""
    arguments: tuple[str, ...] = ()
    address: str = ""
    """Where ssh goes; empty for this machine."""


def _refuse(first: str, why: str = "") -> NoReturn:
    raise Failure(f"a rehearsal runs no host command: {first}" + (f" ({why})" if why else ""))


def parse(command: str) -> Call:
    """Read a command line as one of the forms in which hostctl is called.

        [ssh OPTION... -- DESTINATION] [sudo -n] PATH VERB...
        [ssh OPTION... -- DESTINATION] [sudo -n] python3 -c PROGRAM
        [ssh OPTION... -- DESTINATION] [sudo -n] python3 -c PROGRAM PATH

    Raises :class:`Failure` for every other command.
    """
    words = _words(command)
    address = ""
    if words and words[0] == "ssh":
        destination, words = _destination(words)
        address = destination.rpartition("@")[2]
        # ssh joins the words with spaces and the remote shell splits them again.
        words = _words(" ".join(words))
    if words[:2] == ["sudo", "-n"]:
        words = words[2:]
    if not words:
        _refuse(command.split()[0] if command.split() else "an empty line")
    first, rest = words[0], words[1:]
    if first == "python3" and len(rest) >= 2 and rest[0] == "-c":
        arguments = rest[2:]
        if len(arguments) == 1 and arguments[0].startswith("/"):
            return Call("install", path=arguments[0], address=address)
        if not arguments:
            return Call("shipped", address=address)
        _refuse(first, "neither a PATH to install to nor nothing follows the program")
    if first.startswith("/") and first.endswith("/hostctl") and rest:
        return Call("installed", path=first, arguments=tuple(rest), address=address)
    _refuse(first)


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        words = list(lexer)
    except ValueError as error:
        _refuse(line.split()[0], str(error))
    for word in words:
        if word and not set(word) - set("();<>|&"):
            _refuse(words[0], f"the shell's {word} is in the line")
    return words


_SSH_REQUIRED = ("BatchMode=yes", "StrictHostKeyChecking=yes")


def _destination(words: list[str]) -> tuple[str, list[str]]:
    """Where an ssh call goes that can neither ask nor accept an unknown host, and what it runs."""
    options, index = [], 1
    while index < len(words) and words[index].startswith("-") and words[index] != "--":
        if words[index] in ("-o", "-p", "-i", "-J", "-l", "-F"):
            options.append(words[index + 1] if index + 1 < len(words) else "")
            index += 2
        elif words[index] in ("-T", "-n", "-q"):
            index += 1
        else:
            _refuse("ssh", f"option {words[index]}")
    missing = [option for option in _SSH_REQUIRED if option not in options]
    if missing:
        _refuse("ssh", f"without -o {missing[0]}")
    # Without it ssh takes a destination or command that begins with a dash for an option.
    if "--" not in words[index : index + 2]:
        _refuse("ssh", "no -- before or after the destination")
    (destination,) = (word for word in words[index : index + 2] if word != "--")
    return destination, words[index + 2 :]


_one_at_a_time = threading.Lock()
"""hostctl writes to this process's stdout, of which there is one."""


def _rehearse(command: str, stdin: str, directory: Path) -> Result:
    call = parse(command)
    from hostctl import program
    from rehearsal.machine import RehearsalMachine

    with _one_at_a_time:
        root = directory / "world" / "machines" / call.address
        if not call.address or not root.is_dir():
            root = directory / "world" / "machine"
        if (root / "down").exists():
            said = f"ssh: connect to host {call.address} port 22: No route to host\n"
            return Result("", said, 255)
        machine = RehearsalMachine(root)
        if call.how == "install":
            if stdin != program.packed():
                raise Failure("what is installed is not this checkout's hostctl")
            machine.make_directory(os.path.dirname(call.path), 0o755)
            machine.write_atomic(call.path, program.text().encode(), 0o755)
            return Result("", "")
        if call.how == "installed":
            if not machine.exists(call.path):
                return Result("", f"/bin/sh: 1: {call.path}: not found\n", 127)
            return _run(machine, call.arguments, stdin)
        shipped = json.loads(stdin)
        if shipped["program"] != program.packed():
            raise Failure("what is shipped is not this checkout's hostctl")
        ran = [
            _run(machine, (*verb, "--exit-zero"), json.dumps(spec))
            for verb, spec in shipped["questions"]
        ]
        stdout, stderr = (
            "".join(texts) for texts in zip(*((r.stdout, r.stderr) for r in ran), strict=True)
        )
        return Result(stdout, stderr)


def _run(machine: RehearsalMachine, arguments: Sequence[str], stdin: str) -> Result:
    from hostctl import cli

    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            status = cli.main(list(arguments), stdin=io.StringIO(stdin), machine=machine)
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
    return Result(stdout.getvalue(), stderr.getvalue(), status)


if __name__ == "__main__":
    serve(Command)
