"""Set-up: which tool it takes, and that nothing half-made is ever taken for a tool."""

import hashlib
import http.server
import io
import os
import runpy
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from setup import cache, command, download, tools
from setup.cache import SetupError

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with an empty cache, no download sites, and on PATH only what a test puts there."""
    monkeypatch.setenv("HOMELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    (tmp_path / "path").mkdir()

    def unreachable(url, checksums_url, directory):
        raise SetupError(f"{checksums_url}: no answer")

    monkeypatch.setattr(download, "unpack", unreachable)

    def program(name, script):
        path = tmp_path / "path" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return program


# A Go that "builds" the engine: it writes a program that answers as the engine does.
GO = """
while [ "$1" != -o ]; do shift; done
printf '#!/bin/sh\\necho v3.259.0\\n' > "$2"; chmod +x "$2"
"""


@pytest.mark.parametrize(
    ("printed", "suits"),
    [
        ("v3.259.0", True),
        ("v3.300.12", True),
        ("v3.258.9", False),
        ("v4.0.0", False),
        ("v3.260.0-alpha.1+dirty", True),
        ("command not understood", False),
        ("", False),
    ],
)
def test_an_engine_suits_from_its_pinned_minor_to_the_next_major(printed, suits):
    assert tools.PULUMI.suits(printed) is suits


def test_a_suitable_tool_on_path_is_taken_before_anything_else(machine):
    path = machine("pulumi", "echo v3.270.1")
    found = tools.pulumi()
    assert found.directory == path.parent
    assert str(path) in found.why
    assert not cache.root().exists()


def test_an_unsuitable_tool_on_path_is_said_and_the_ways_are_tried_in_order(machine, capsys):
    machine("pulumi", "echo v3.100.0")
    machine("go", GO)
    found = tools.pulumi()
    assert found.directory == cache.root() / "pulumi-3.259.0" / "bin"
    assert "Go module" in found.why
    said = capsys.readouterr().err
    assert said.index("v3.100.0 at") < said.index("release: ") < said.index("building it")


def test_the_release_is_taken_where_it_can_be_downloaded(machine, monkeypatch):
    machine("go", "exit 1")

    def unpack(url, checksums_url, directory):
        (directory / "pulumi").write_text("#!/bin/sh\necho v3.259.0\n")
        (directory / "pulumi").chmod(0o755)

    monkeypatch.setattr(download, "unpack", unpack)
    assert "official release" in tools.pulumi().why


def test_what_is_in_the_cache_is_not_made_again(machine):
    go = machine("go", GO)
    first = tools.pulumi()
    go.unlink()
    assert tools.pulumi() == first


def test_a_tool_that_cannot_be_had_names_every_way_and_leaves_nothing(machine, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(os.environ["PATH"].split(":")[0])))
    with pytest.raises(SetupError) as raised:
        tools.pulumi()
    text = str(raised.value)
    assert "put pulumi >= 3.259, < 4 on PATH" in text
    assert "release: https://" in text
    assert "Go module: go is not on PATH" in text
    assert not (cache.root() / "pulumi-3.259.0").exists()


def test_a_build_that_gives_a_program_that_does_not_run_is_a_failure(machine):
    machine("go", GO.replace("echo v3.259.0", "exit 3"))
    with pytest.raises(SetupError, match="does not run as pulumi"):
        tools.pulumi()


def test_the_host_that_comes_with_the_engine_is_taken_before_ours(machine):
    engine = machine("pulumi", "echo v3.259.0")
    host = machine("pulumi-language-python", "echo official")
    found = tools.language_host(tools.pulumi(), tools.Found(Path("/nowhere"), ""))
    assert (found.directory, found.why) == (engine.parent, "beside the engine")
    assert host.read_text().endswith("echo official\n")


def test_only_asking_installs_nothing_and_names_the_remedy(machine, capsys):
    machine("uv", "echo uv 0.13.8")
    assert command.main(["--env"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "pulumi is not set up yet; run `make setup`" in printed.err


def test_the_shell_line_adds_only_what_path_does_not_hold(machine, tmp_path):
    machine("uv", "echo uv 0.13.8")
    machine("pulumi", "echo v3.259.0")
    machine("pulumi-language-python", "")
    found = command.resolve()
    assert command.missing(found) == []
    found["pulumi"] = tools.Found(tmp_path / "elsewhere", "")
    assert command.missing(found) == [str(tmp_path / "elsewhere")]
    assert command.search_path(found) == f"{tmp_path / 'elsewhere'}:{os.environ['PATH']}"


INSTALLER = """
import signal, sys, time
from pathlib import Path
from setup import cache
# A shell's background job ignores it, and so would this.
signal.signal(signal.SIGINT, signal.default_int_handler)
def make(directory):
    (directory / "tool").write_text("half")
    print("half", flush=True)
    time.sleep(float(sys.argv[1]))
    (directory / "tool").write_text("whole")
    return "there"
cache.install("tool-1", make)
"""


def start_installer(seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", INSTALLER, str(seconds)], cwd=CHECKOUT, stdout=subprocess.PIPE
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_installation_leaves_no_tool_and_the_next_one_succeeds(machine, how):
    interrupted = start_installer(60)
    assert interrupted.stdout
    with interrupted.stdout as stdout:
        assert stdout.readline() == b"half\n"
        interrupted.send_signal(how)
        assert interrupted.wait() != 0
    assert not (cache.root() / "tool-1").exists()
    with start_installer(0) as again:
        assert again.wait() == 0
    assert (cache.root() / "tool-1" / "tool").read_text() == "whole"
    assert [p.name for p in cache.root().iterdir() if not p.name.endswith(".lock")] == ["tool-1"]


def test_two_installations_at_once_make_it_once(machine):
    first, second = start_installer(0.5), start_installer(0.5)
    outputs = [process.communicate()[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert sorted(outputs) == [b"", b"half\n"]


def test_a_long_step_shows_progress_and_a_failed_one_its_last_lines(machine, monkeypatch, capsys):
    monkeypatch.setattr(cache, "PROGRESS_SECONDS", 0.2)
    with pytest.raises(SetupError, match=r"build: sh exited with code 7:\n(.*\n)*no space left"):
        cache.run("build", ["sh", "-c", "echo compiling; sleep 0.6; echo no space left; exit 7"])
    assert "build: 0 s  compiling" in capsys.readouterr().err


def test_an_interrupted_step_takes_its_process_with_it(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "PROGRESS_SECONDS", 0.2)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "say", interrupt)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cache.run("build", ["sleep", "30"])
    assert time.monotonic() - started < 10


@pytest.fixture
def site(tmp_path):
    """A web server of one directory, as (its address, the directory)."""
    directory = tmp_path / "site"
    directory.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(directory))

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", directory
        server.shutdown()


def publish(directory: Path, **files: str) -> str:
    """An archive with these files; returns its checksum."""
    with tarfile.open(directory / "tool.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o777
            tar.addfile(member, io.BytesIO(content.encode()))
    return hashlib.sha256((directory / "tool.tar.gz").read_bytes()).hexdigest()


def test_a_release_is_unpacked_without_its_top_directory(site, tmp_path):
    address, directory = site
    digest = publish(directory, **{"tool-1/bin": "program", "tool-1/../../evil": "outside"})
    (directory / "sums").write_text(f"{'0' * 64}  other.tar.gz\n{digest}  tool.tar.gz\n")
    target = tmp_path / "target"
    target.mkdir()
    download.unpack(f"{address}/tool.tar.gz", f"{address}/sums", target)
    assert [(p.name, p.read_text()) for p in target.iterdir()] == [("bin", "program")]
    assert (target / "bin").stat().st_mode & 0o777 == 0o755
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("sums", "error"),
    [
        (f"{'0' * 64}  tool.tar.gz", "SHA-256 is"),
        (f"{'0' * 64}  other.tar.gz", "not in the published checksums"),
        (None, "404"),
    ],
)
def test_a_release_that_cannot_be_verified_is_refused(site, tmp_path, sums, error):
    address, directory = site
    publish(directory, **{"tool-1/bin": "program"})
    if sums:
        (directory / "sums").write_text(sums)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(SetupError, match=error):
        download.unpack(f"{address}/tool.tar.gz", f"{address}/sums", target)
    assert not (target / "bin").exists()


def test_an_old_python_is_told_how_to_name_a_newer_one(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"needs Python 3\.10.*make PYTHON="):
        runpy.run_path(str(CHECKOUT / "setup" / "__main__.py"), run_name="__main__")


def test_the_pinned_engine_is_the_pinned_sdk_and_go_module():
    pinned = tools.PULUMI.version
    assert f'"pulumi=={pinned}"' in (CHECKOUT / "pyproject.toml").read_text()
    assert (
        f"github.com/pulumi/pulumi/pkg/v3 v{pinned}" in (CHECKOUT / "setup/go/go.mod").read_text()
    )
