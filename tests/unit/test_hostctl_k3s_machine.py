"""What k3s' verbs ask of a real machine: a database in use, a text at a URL, a program."""

import sqlite3
import stat
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from hostctl.machine import Machine


def test_a_database_is_copied_while_it_is_written_to(tmp_path: Path) -> None:
    source, copy = tmp_path / "state.db", tmp_path / "copy.db"
    writing = sqlite3.connect(source)
    writing.execute("PRAGMA journal_mode=WAL")
    writing.execute("CREATE TABLE kine (name TEXT)")
    writing.execute("INSERT INTO kine VALUES ('committed')")
    writing.commit()
    writing.execute("INSERT INTO kine VALUES ('under way')")
    assert Machine().copy_database(str(source), str(copy)) is None
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    copied = sqlite3.connect(copy)
    assert copied.execute("SELECT name FROM kine").fetchall() == [("committed",)]
    copied.close()
    writing.close()


def test_what_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"no database at all" * 100)
    wrong = Machine().copy_database(str(tmp_path / "state.db"), str(tmp_path / "copy.db"))
    assert wrong is not None
    assert "state.db" in wrong


class _Release(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path == "/sha256sum-amd64.txt"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(b"0" * 64 + b"  k3s\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_text_is_read_from_its_url_and_an_absent_one_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), _Release) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        assert Machine().read_url(f"{at}/sha256sum-amd64.txt").endswith(b"  k3s\n")
        with pytest.raises(OSError, match="404"):
            Machine().read_url(f"{at}/none")
        server.shutdown()


def test_a_program_is_found_and_one_that_is_not_there_is_not() -> None:
    assert Machine().has_program("sh")
    assert not Machine().has_program("no-such-program-here")
