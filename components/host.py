"""Where the commands of a stack run: on this machine, or on a host over OpenSSH.

Everything a host does for a stack is a verb of ``hostctl`` (see ``hostctl/README.md``), called in
two ways:

- *read*: hostctl's text is piped to the host's ``python3`` by the invoke ``command:local:run``,
  which preview and up both execute. Nothing has to be installed, so the first preview of a new host
  works.
- *change*: a :class:`pulumi_command.local.Command` runs the hostctl that :class:`Host` installed at
  a fixed path. Its inputs hold no path, user or hash of a checkout: two operators see no
  difference, and a delete stored long ago still runs.
"""

import json
import shlex
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

import pulumi
from pulumi_command import local

from components import settings
from hostctl import program

if TYPE_CHECKING:
    import pulumi_docker as docker

# `python3 -c` gets the program on stdin together with what is asked, so neither is ever an argument
# that `ps` shows. Each answer is a line.
_BOOT = (
    'import base64,bz2,io,json,sys;r=json.load(sys.stdin);g={"__name__":"hostctl"};'
    'exec(compile(bz2.decompress(base64.b64decode(r["program"])),"hostctl","exec"),g);'
    '[g["main"]([*v,"--exit-zero"],io.StringIO(json.dumps(s)))for v,s in r["questions"]]'
)
_INSTALL = (
    "import base64,bz2,fcntl,os,sys;c=bz2.decompress(base64.b64decode(sys.stdin.read()));"
    'p=sys.argv[1];t=p+".new";d=os.path.dirname(p);os.makedirs(d,exist_ok=True);h=os.open(d,0);'
    'fcntl.flock(h,2);o=open(t,"wb");os.fchmod(o.fileno(),0o755);o.write(c);o.flush();'
    "os.fsync(o.fileno());o.close();os.replace(t,p);os.fsync(h)"
)

_TIME_LIMIT = pulumi.CustomTimeouts(create="1h", update="1h", delete="1h")


Question = tuple[Sequence[str], Mapping[str, Any]]
"""A verb of hostctl that only looks, and its spec."""

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")

Reading = Generator[list[Question], list[dict[str, Any]], T]
"""Something read from a host: it yields questions, is sent their results, and returns what it made
of them. :func:`together` asks the questions of several at once, so that a preview calls a distant
host twice and not once a question.
"""


def ask(verb: Sequence[str], spec: Mapping[str, Any]) -> Reading[dict[str, Any]]:
    """Reads the result of one verb."""
    [result] = yield [(verb, spec)]
    return result


@overload
def together(a: Reading[A], b: Reading[B], /) -> Reading[tuple[A, B]]: ...
@overload
def together(a: Reading[A], b: Reading[B], c: Reading[C], /) -> Reading[tuple[A, B, C]]: ...
def together(*readings: Reading[Any]) -> Reading[tuple[Any, ...]]:
    """Reads what each of them reads. What they ask in the same round is asked in one call."""
    read: dict[int, Any] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(readings)))
    while True:
        questions: dict[int, list[Question]] = {}
        for index, answer in answers.items():
            try:
                questions[index] = readings[index].send(answer)
            except StopIteration as end:
                read[index] = end.value
        if not questions:
            return tuple(read[index] for index in range(len(readings)))
        results = yield [question for asked in questions.values() for question in asked]
        remaining = iter(results)
        answers = {index: [next(remaining) for _ in asked] for index, asked in questions.items()}


class HostError(pulumi.RunError):
    """A host that cannot be read or that refuses: names the host, the step, the cause and the
    remedy.
    """


class Unreachable(HostError):
    """A host on which nothing could be run: what it has cannot be told."""


class Connection:
    """How commands reach the host of a stack.

    ``settings.connection`` ``local`` runs them on the machine that runs Pulumi; ``ssh`` by the
    OpenSSH client, which brings its own agent, ``~/.ssh/config`` and ProxyJump. Host keys are
    always checked and nothing is ever asked.
    """

    def __init__(self, host: settings.Host) -> None:
        self._host = host
        self._program = program.packed()

    @property
    def name(self) -> str:
        """The host in messages: its address, or ``this machine``."""
        if self._host.connection == "local":
            return "this machine"
        return f"host {self._host.address}"

    @property
    def program(self) -> str:
        """hostctl as it is shipped: its text, packed."""
        return self._program

    def line(self, *argv: str) -> str:
        """The shell line that runs ``argv`` on the host."""
        remote = shlex.join(["sudo", "-n", *argv] if self._host.sudo else argv)
        if self._host.connection == "local":
            return remote
        return f"{shlex.join(self._ssh())} {shlex.quote(remote)}"

    def installed(self, verb: Sequence[str]) -> str:
        """The shell line that runs a verb of the installed hostctl."""
        return self.line(self._host.hostctl, *verb)

    def install_line(self) -> str:
        """The shell line that installs hostctl, packed on stdin: atomically and executable."""
        return self.line("python3", "-c", _INSTALL, self._host.hostctl)

    def read(self, reading: Reading[T]) -> T:
        """Asks the host now, one call a round of questions.

        Raises :class:`HostError` when the host cannot be reached, cannot tell, or refuses; the
        caller has registered nothing yet.
        """
        answers = None
        while True:
            try:
                questions = reading.send(answers)  # pyright: ignore[reportArgumentType]
            except StopIteration as end:
                return end.value
            answers = self.answers(questions) if questions else []

    def answers(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """The results in order, of one call. Raises :class:`HostError` with all refusals."""
        return self._answers(questions, may_be_silent=False)

    def look(self, verb: Sequence[str], spec: Mapping[str, Any]) -> dict[str, Any]:
        """The result of one verb on a host that the caller can do without: after
        :class:`Unreachable` it may go on. (A failed invoke would end the run, whoever catches it.)
        """
        [result] = self._answers([(verb, spec)], may_be_silent=True)
        return result

    def results(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """The results in order, of one call, refusals among them. Raises :class:`Unreachable`."""
        return self._results(questions, may_be_silent=True)

    def _answers(
        self, questions: Sequence[Question], *, may_be_silent: bool
    ) -> list[dict[str, Any]]:
        results = self._results(questions, may_be_silent=may_be_silent)
        refusals = [
            f"{error['step']} on {self.name} failed.\n  Cause: {error['cause']}\n"
            f"  Remedy: {error['remedy']}"
            for error in (result["error"] for result in results if not result["ok"])
        ]
        if refusals:
            raise HostError("\n".join(dict.fromkeys(refusals)))
        return results

    def _results(
        self, questions: Sequence[Question], *, may_be_silent: bool
    ) -> list[dict[str, Any]]:
        step = f"hostctl {', '.join(' '.join(verb) for verb, _ in questions)} on {self.name}"
        line = self.line("python3", "-c", _BOOT)
        try:
            answer = local.run(
                command=f"{line} || true" if may_be_silent else line,
                stdin=json.dumps({"program": self._program, "questions": questions}),
                logging=local.Logging.NONE,
                add_previous_output_in_env=False,
            )
        except Exception as failure:
            cause = _last_line(str(failure))
            raise _error(f"{step} did not run", cause, self._unreachable_remedy()) from None
        try:
            results = [json.loads(line) for line in answer.stdout.splitlines()]
        except ValueError:
            results = []
        if len(results) != len(questions):
            if may_be_silent:
                cause = _last_line(answer.stderr) or "no output"
                remedy = self._unreachable_remedy()
                raise Unreachable(_text(f"{step} did not run", cause, remedy))
            raise _error(
                f"{step} printed no JSON result",
                _last_line(answer.stderr) or "no output",
                "run the verb by hand on the host and read what it prints",
            )
        return results

    @property
    def ssh_options(self) -> list[str]:
        """The options of OpenSSH's client on the way to the host; none for a local one."""
        host = self._host
        if host.connection == "local":
            return []
        options = [
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            "ConnectTimeout=10",
            "ServerAliveInterval=15",
        ]
        if host.known_hosts:
            options.append(f"UserKnownHostsFile={host.known_hosts}")
        if host.identity_file:
            # Alone: a server counts every key that an agent offers as a failed attempt.
            options += [f"IdentityFile={host.identity_file}", "IdentitiesOnly=yes"]
        argv = [word for option in options for word in ("-o", option)]
        if host.jump:
            # Not -J, whose hop would take none of these options and could ask (ssh(1)).
            hop = shlex.join(["ssh", *argv, "-W", "[%h]:%p", "--", f"ssh://{host.jump}"])
            argv += ["-o", f"ProxyCommand={hop}"]
        return argv

    def _ssh(self) -> list[str]:
        host = self._host
        port = ["-p", str(host.port)] if host.port != 22 else []
        destination = f"{host.user}@{host.address}" if host.user else str(host.address)
        return ["ssh", *self.ssh_options, *port, "--", destination]

    def _unreachable_remedy(self) -> str:
        if self._host.connection == "local":
            sudo = ", and that `sudo -n true` works (homelab:host.sudo)" if self._host.sudo else ""
            return f"check that python3 (3.9 or newer) is on PATH here{sudo}."
        return (
            f"check that `{shlex.join(self._ssh())} python3 --version` works without a question: "
            "address, key, known host key and python3 (3.9 or newer) on the host (homelab:host)."
        )


def this_machine() -> Connection:
    """The machine that runs Pulumi."""
    return Connection(settings.Host())


class Host(pulumi.ComponentResource):
    """The host of a stack, with hostctl installed at ``homelab:host.hostctl``.

    The installed file stays when the stack is destroyed: other stacks on the host, its boot unit
    and a person on a broken night use it.
    """

    hostctl: local.Command
    tools: list[pulumi.Resource]
    """What installs the tools that the settings let the stack install: before the cluster."""

    def __init__(
        self,
        name: str,
        connection: Connection,
        opts: pulumi.ResourceOptions | None = None,
        *,
        k3d: settings.K3d | None = None,
        node: str | None = None,
    ) -> None:
        """``node`` is the machine's name where it is one of several of the stack."""
        super().__init__("homelab:index:Host", name, None, opts)
        self.connection = connection
        self.tools = []
        install = connection.install_line()
        self.hostctl = local.Command(
            f"hostctl {node}" if node else "hostctl",
            create=install,
            update=install,
            stdin=connection.program,
            logging=local.Logging.STDERR,
            add_previous_output_in_env=False,
            opts=pulumi.ResourceOptions(parent=self, custom_timeouts=_TIME_LIMIT),
        )
        if k3d and k3d.install:
            release = {"version": k3d.version, "sha256": k3d.sha256, "url": k3d.url}
            child = pulumi.ResourceOptions(parent=self)
            self.tools.append(self.command("k3d", ["install", "k3d"], release, opts=child))
        self.register_outputs({})

    def command(
        self,
        name: str,
        verb: Sequence[str],
        spec: Mapping[str, Any],
        *,
        secret: bool = False,
        delete: Sequence[str] | None = None,
        triggers: Sequence[Any] | None = None,
        opts: pulumi.ResourceOptions,
    ) -> local.Command:
        """A verb of the installed hostctl as a resource: create and update are the same idempotent
        call.

        ``spec`` travels on stdin, so an edit updates in place and never replaces; ``triggers``
        replace. ``secret`` marks the spec and both outputs secret and logs nothing: a failed
        command's text would otherwise be printed. ``delete`` is the verb that `destroy` runs from
        the state; without one nothing is undone on the host.
        """
        stdin = pulumi.Output.json_dumps(spec)
        return local.Command(
            name,
            create=self.connection.installed(verb),
            update=self.connection.installed(verb),
            delete=self.connection.installed(delete) if delete else None,
            stdin=pulumi.Output.secret(stdin) if secret else stdin,
            triggers=list(triggers) if triggers else None,
            logging=local.Logging.NONE if secret else local.Logging.STDERR,
            add_previous_output_in_env=False,
            opts=pulumi.ResourceOptions.merge(
                pulumi.ResourceOptions(
                    depends_on=[self.hostctl],
                    # With a fixed name, the delete that follows would undo the create. Without a
                    # delete the engine's order stands: only then does it skip what is
                    # `deleted_with` this.
                    delete_before_replace=True if delete else None,
                    # hostctl bounds all that it waits for; this is for a host that hangs.
                    custom_timeouts=_TIME_LIMIT,
                    additional_secret_outputs=["stdout", "stderr"] if secret else None,
                ),
                opts,
            ),
        )


def docker_engine(host: settings.Host, connection: Connection) -> "docker.Provider":
    """The host's Docker engine, reached as the host is."""
    # Not above: the package costs time, and only who has something in Docker pays.
    import pulumi_docker as docker

    return docker.Provider("docker", host=host.docker, ssh_opts=connection.ssh_options or None)


def kubeconfig_path(cluster: str) -> str:
    """Where the host keeps the way into a cluster that is none of k3d's, from the first up on."""
    return f"/var/lib/homelab/kubeconfigs/{cluster}"


def result(command: local.Command) -> pulumi.Output[dict[str, Any]]:
    """The JSON result that a hostctl verb printed."""
    return command.stdout.apply(json.loads)


def _error(step: str, cause: str, remedy: str) -> HostError:
    return HostError(_text(step, cause, remedy))


def _text(step: str, cause: str, remedy: str) -> str:
    return f"{step}.\n  Cause: {cause}\n  Remedy: {remedy}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
