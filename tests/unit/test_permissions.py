"""What the API token may do: found out by reading, before anything of Cloudflare is declared.

Invariants: what is needed follows from the routes; each permission that is missing is refused by
name, all of them in one error; more than is needed only warns, and so does an API that gives no
answer in its own form; the token is in no message and goes to no other address.
"""

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pulumi
import pytest
import yaml

from components import permissions, settings
from components.permissions import Permissions
from rehearsal import api
from tests.unit.conftest import Registered

ACCOUNT, ZONE, LAB = "a" * 32, "e" * 32, "f" * 32
TOKEN = "canary-api-token-of-at-least-forty-characters"
ZONES = {"example.org": ZONE, "lab.example.org": LAB, "unused.example.org": "b" * 32}
OPEN = {"hostname": "a.example.org", "service": "http://localhost:80"}
GATED = {**OPEN, "hostname": "b.lab.example.org", "access": {"emails": ["me@example.org"]}}

TUNNEL = f"Account {ACCOUNT}: Cloudflare Tunnel Edit"
RECORDS = f"Zone example.org ({ZONE}): DNS Edit"
RECORDS_OF_LAB = f"Zone lab.example.org ({LAB}): DNS Edit"
LOGINS = f"Account {ACCOUNT}: Access: Apps and Policies Edit"

Check = Callable[..., list[str]]


def declared(*routes: dict[str, Any]) -> tuple[settings.Cloudflare, dict[str, settings.Tunnel]]:
    tunnel = {
        "secret": "bWFkZS11cC1leGFtcGxlLW1hZGUtdXAtZXhhbXBsZS0=",
        "connector": {"kind": "external"},
        "routes": list(routes),
    }
    account = {"accountId": ACCOUNT, "apiToken": TOKEN, "zones": ZONES}
    return (
        settings.Cloudflare.model_validate(account),
        {"media": settings.Tunnel.model_validate(tunnel)},
    )


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the stand-in of Cloudflare's API."""
    (tmp_path / "project").mkdir()
    monkeypatch.setenv("CLOUDFLARE_BASE_URL", api.address(tmp_path, "test"))
    return tmp_path


@pytest.fixture
def check(
    directory: Path,
    run_program: Callable[..., Registered],
    caplog: pytest.LogCaptureFixture,
) -> Check:
    """The warnings of a check for these routes, where the token may also do what is said of it."""

    def run(*routes: dict[str, Any], **may: Any) -> list[str]:
        account, tunnels = declared(*routes)
        config = {
            "homelab:cloudflare": {"accountId": ACCOUNT, "zones": ZONES},
            "homelab:tunnels": {"media": {"routes": list(routes)}},
        }
        (directory / "project/Pulumi.test.yaml").write_text(yaml.safe_dump({"config": config}))
        (directory / "token.json").write_text(json.dumps(may))
        caplog.clear()
        run_program(lambda: Permissions(account, tunnels).check())
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    return run


def asked(directory: Path) -> list[str]:
    return sorted((directory / "asked.txt").read_text().splitlines())


@contextmanager
def served(status: int, content: str, **headers: str) -> Iterator[tuple[str, list[str]]]:
    """A server that always says the same: its address and the Authorization that it was sent."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            body = content.replace("AUTHORIZATION", seen[-1]).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing of it is for the test's output."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def test_what_is_needed_follows_from_the_routes():
    def needed(*routes: dict[str, Any]) -> list[str]:
        return [read.permission for read in permissions.reads(*declared(*routes))[0]]

    assert needed() == [TUNNEL]
    assert needed(OPEN) == [TUNNEL, RECORDS]
    assert needed(OPEN, GATED) == [TUNNEL, RECORDS, RECORDS_OF_LAB, LOGINS]


def test_a_token_with_just_that_is_nothing_to_tell_of(check: Check, directory: Path):
    assert check(OPEN, GATED) == []
    assert asked(directory) == [
        f"GET accounts/{ACCOUNT}/access/apps",
        f"GET accounts/{ACCOUNT}/cfd_tunnel",
        f"GET accounts/{ACCOUNT}/members",
        f"GET accounts/{ACCOUNT}/tokens",
        "GET user/tokens",
        "GET zones",
        f"GET zones/{ZONE}/dns_records",
        f"GET zones/{LAB}/dns_records",
    ]
    assert check(OPEN) == check() == []


ALLOWED = f"Allowed: a token with {TUNNEL}; {RECORDS}; {RECORDS_OF_LAB}; {LOGINS}."


@pytest.mark.parametrize(
    ("path", "permission", "needed_for"),
    [
        (f"accounts/{ACCOUNT}/cfd_tunnel", TUNNEL, "tunnel media"),
        (f"zones/{ZONE}/dns_records", RECORDS, "the records of its routes"),
        (f"zones/{LAB}/dns_records", RECORDS_OF_LAB, "the records of its routes"),
        (f"accounts/{ACCOUNT}/access/apps", LOGINS, "access of b.lab.example.org"),
    ],
)
def test_each_permission_that_is_missing_is_refused_by_name(
    check: Check, path: str, permission: str, needed_for: str
):
    with pytest.raises(pulumi.RunError) as refused:
        check(OPEN, GATED, **{f"GET {path}": 403})
    assert str(refused.value) == (
        "homelab:cloudflare.apiToken: 1 permission(s) that this stack needs are refused by"
        " Cloudflare; nothing was changed:\n"
        f"  {permission}, for {needed_for}: 403 Authentication error (10000)\n"
        f"  {ALLOWED}\n"
        "  Remedy: give the token what is missing in Cloudflare's dashboard, or mend"
        " homelab:cloudflare.accountId or zones if an id is wrong (docs/tunnels.md#the-api-token)."
        " Only reading is tried: Read instead of Edit fails at the resource."
    )


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_all_that_is_missing_is_in_one_error(check: Check, status: int):
    with pytest.raises(pulumi.RunError) as refused:
        check(OPEN, GATED, **{"*": status})
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("homelab:cloudflare.apiToken: 4 permission(s)")
    for line, permission in zip(lines[1:5], [TUNNEL, RECORDS, RECORDS_OF_LAB, LOGINS], strict=True):
        assert line.startswith(f"  {permission}, for ")
        assert f": {status} " in line


@pytest.mark.parametrize(
    ("may", "permission"),
    [
        ({"GET user/tokens": 200}, "User: API Tokens Read"),
        ({"GET accounts/*/tokens": 200}, f"Account {ACCOUNT}: Account API Tokens Read"),
        ({"GET accounts/*/members": 200}, f"Account {ACCOUNT}: Account Settings Read"),
        ({"GET zones": ["example.org", "example.net"]}, "Zone example.net: Zone Read"),
        (
            {"GET zones": [f"{name}.example.net" for name in "abcde"]},
            "Zone a.example.net, b.example.net, c.example.net and 2 more: Zone Read",
        ),
        ({"GET */access/apps": 200}, f"Account {ACCOUNT}: Access: Apps and Policies Read"),
    ],
)
def test_what_the_token_may_do_beyond_the_need_is_a_warning(
    check: Check, may: dict[str, Any], permission: str
):
    assert check(OPEN, **may) == [
        "homelab:cloudflare.apiToken: the token may do more than this stack needs:\n"
        f"  {permission}\n"
        f"  Allowed: a token with {TUNNEL}; {RECORDS}.\n"
        "  Remedy: take the rest from it in Cloudflare's dashboard (docs/tunnels.md#the-api-token)."
    ]


def test_more_than_is_needed_is_told_beside_what_is_missing(
    check: Check, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(pulumi.RunError, match="Cloudflare Tunnel Edit, for tunnel media"):
        check(OPEN, **{"GET user/tokens": 200, "GET */cfd_tunnel": 403})
    assert "User: API Tokens Read" in caplog.text


def test_the_stacks_own_zones_are_not_too_much(check: Check):
    assert check(OPEN, **{"GET zones": list(ZONES)}) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_api_that_is_busy_or_broken_is_one_warning(check: Check, status: int):
    [warning] = check(OPEN, **{"*": status})
    assert warning.startswith(
        "homelab:cloudflare.apiToken: 7 of 7 looks at what the token may do got no answer from"
        f" Cloudflare, so that a wrong permission shows at the resource that needs it: {status} "
    )
    assert warning.count("\n") == 0


def test_what_is_seen_counts_while_the_rest_is_not(check: Check, caplog: pytest.LogCaptureFixture):
    with pytest.raises(pulumi.RunError, match="1 permission"):
        check(OPEN, **{"GET */cfd_tunnel": 403, "GET zones/*": 503})
    assert "1 of 7 looks" in caplog.text


def test_an_api_that_is_not_reached_is_one_warning(check: Check, monkeypatch: pytest.MonkeyPatch):
    with served(200, "") as (address, _):
        pass
    monkeypatch.setenv("CLOUDFLARE_BASE_URL", address)
    [warning] = check(OPEN)
    assert warning.endswith(": [Errno 111] Connection refused")


def test_an_api_that_says_nothing_is_waited_for_in_vain_for_a_while(
    check: Check, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(permissions, "_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("CLOUDFLARE_BASE_URL", f"http://127.0.0.1:{port}")
        [warning] = check(OPEN)
    assert warning.endswith(": timed out")


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (403, "<html>blocked by a proxy</html>"),
        (403, "[]"),
        (200, "{}"),
        (200, "welcome to this hotel"),
        (200, '{"success": "yes"}'),
        (200, '"success"'),
    ],
)
def test_who_answers_in_cloudflares_place_says_nothing_of_the_token(
    check: Check, monkeypatch: pytest.MonkeyPatch, status: int, content: str
):
    with served(status, content) as (address, _):
        monkeypatch.setenv("CLOUDFLARE_BASE_URL", address)
        [warning] = check(OPEN)
    assert warning.endswith(f": status {status}, not in the form of Cloudflare's API")


@pytest.mark.parametrize("address", ["https://", "cloudflare", "ftp://[::1"])
def test_an_address_that_is_none_is_said(
    check: Check, monkeypatch: pytest.MonkeyPatch, address: str
):
    monkeypatch.setenv("CLOUDFLARE_BASE_URL", address)
    [warning] = check(OPEN)
    assert "7 of 7 looks" in warning


def test_what_answers_in_a_strange_form_breaks_nothing(
    check: Check, monkeypatch: pytest.MonkeyPatch
):
    for content in ('{"success": true, "result": 1}', '{"success": true, "result": [1, {}]}'):
        with served(200, content) as (address, _):
            monkeypatch.setenv("CLOUDFLARE_BASE_URL", address)
            [warning] = check(OPEN)
        assert "User: API Tokens Read" in warning
    with served(403, '{"success": false, "errors": 1}') as (address, _):
        monkeypatch.setenv("CLOUDFLARE_BASE_URL", address)
        with pytest.raises(pulumi.RunError, match="for tunnel media: 403\n"):
            check(OPEN)


def test_the_token_goes_to_no_other_address(check: Check, monkeypatch: pytest.MonkeyPatch):
    with served(200, "") as (elsewhere, seen), served(302, "", Location=elsewhere) as (address, _):
        monkeypatch.setenv("CLOUDFLARE_BASE_URL", address)
        [warning] = check(OPEN)
    assert seen == []
    assert "status 302" in warning


@pytest.mark.parametrize("status", [403, 503])
def test_a_token_that_the_answer_repeats_is_in_no_message(
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
):
    errors = '[{"code": 1, "message": "AUTHORIZATION\\u001b[31m is not\\nallowed"}]'
    with served(status, f'{{"success": false, "errors": {errors}}}') as (address, seen):
        monkeypatch.setenv("CLOUDFLARE_BASE_URL", address)
        if status == 403:
            with pytest.raises(pulumi.RunError) as refused:
                check(OPEN)
            said = str(refused.value)
        else:
            [said] = check(OPEN)
    assert set(seen) == {f"Bearer {TOKEN}"}
    assert TOKEN not in said + caplog.text
    assert f"{status} Bearer [secret] [31m is not allowed (1)" in said
