"""The API token under the real engine: too little is refused before anything, too much is told."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from rehearsal.run import Rehearsal, Run, Secret
from tests.engine.conftest import errors, planned

pytestmark = pytest.mark.engine

ACCOUNT, ZONE = "a" * 32, "e" * 32
TUNNEL = f"Account {ACCOUNT}: Cloudflare Tunnel Edit"
RECORDS = f"Zone example.org ({ZONE}): DNS Edit"
LOGINS = f"Account {ACCOUNT}: Access: Apps and Policies Edit"
TOKEN = "made-up-token-" + "t" * 40


class Published(Rehearsal):
    """A stack with a tunnel of which one hostname asks for a login."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "dev", self.settings())

    def settings(self, **tunnel: Any) -> dict[str, Any]:
        open_ = {"hostname": "a.example.org", "service": "http://localhost"}
        gated = {"hostname": "b.example.org", "access": {"emails": ["me@example.org"]}}
        media = {
            "secret": Secret("dGhlIHNlY3JldCB0aGF0IHRoZSBpbmN1bWJlbnQgdXNlcy4u"),
            "connector": {"kind": "external"},
            "routes": [open_, {**open_, **gated}],
            **tunnel,
        }
        return {
            "cluster": {"image": "rancher/k3s:v1.31.5-k3s1", "delete": "factory"},
            "cloudflare": {
                "accountId": ACCOUNT,
                "apiToken": Secret(TOKEN),
                "zones": {"example.org": ZONE},
            },
            "tunnels": {"media": media},
        }

    def asked(self) -> list[str]:
        """What was asked of Cloudflare's API since the last time."""
        file = self.directory / "asked.txt"
        lines = sorted(file.read_text().splitlines()) if file.exists() else []
        file.unlink(missing_ok=True)
        return lines


def warnings(run: Run) -> list[str]:
    """Those about the token."""
    return [text for text in run.diagnostics if text.startswith("warning: homelab:cloudflare.api")]


def assert_nothing_is_there(stack: Published) -> None:
    assert stack.resources() == []
    for made in ("cloudflare", "machine/clusters"):
        assert list((stack.directory / "world" / made).rglob("*.json")) == []


def test_a_token_without_a_permission_is_refused_before_anything_is_made(tmp_path):
    stack = Published(tmp_path)
    needed = {
        "accounts/*/cfd_tunnel": f"{TUNNEL}, for tunnel media",
        "zones/*/dns_records": f"{RECORDS}, for the records of its routes",
        "accounts/*/access/apps": f"{LOGINS}, for access of b.example.org",
    }

    def assert_refused(run: Run, lines: Iterable[str]) -> None:
        assert run.code != 0
        told = [f"  {line}: 403 Authentication error (10000)\n" for line in lines]
        assert errors(run) == [
            f"error: homelab:cloudflare.apiToken: {len(told)} permission(s) that this stack needs"
            f" are refused by Cloudflare; nothing was changed:\n{''.join(told)}"
            f"  Allowed: a token with {TUNNEL}; {RECORDS}; {LOGINS}.\n"
            "  Remedy: give the token what is missing in Cloudflare's dashboard, or mend"
            " homelab:cloudflare.accountId or zones if an id is wrong"
            " (docs/tunnels.md#the-api-token). Only reading is tried: Read instead of Edit fails at"
            " the resource."
        ]
        assert TOKEN not in run.stdout + run.stderr
        assert_nothing_is_there(stack)

    for path, line in needed.items():
        stack.set_token({f"GET {path}": 403})
        assert_refused(stack.preview(check=False), [line])
    stack.set_token({"GET *": 403})
    assert_refused(stack.up(check=False), needed.values())


def test_the_life_of_a_stack_with_tokens_of_every_kind(tmp_path):
    stack = Published(tmp_path)
    # Just what is needed.
    assert warnings(stack.preview()) == []
    assert len(stack.asked()) == 7

    # It cannot be seen: a warning, and all is made.
    stack.environment = {"CLOUDFLARE_BASE_URL": "http://127.0.0.1:9"}
    up = stack.up()
    (warning,) = warnings(up)
    assert warning.startswith("warning: homelab:cloudflare.apiToken: 7 of 7 looks at")
    assert warning.endswith(": [Errno 111] Connection refused")
    assert len([step for step in planned(up) if "create DnsRecord" in step]) == 2
    stack.environment = {}
    stack.set_token({"*": 429})
    (warning,) = warnings(stack.up("--expect-no-changes"))
    assert "429 Please wait and consider throttling" in warning

    # More than is needed: a warning, and nothing else.
    stack.set_token({"GET user/tokens": 200, "GET zones": ["example.org", "example.net"]})
    (warning,) = warnings(stack.up("--expect-no-changes"))
    assert warning == (
        "warning: homelab:cloudflare.apiToken: the token may do more than this stack needs:\n"
        "  User: API Tokens Read\n"
        "  Zone example.net: Zone Read\n"
        f"  Allowed: a token with {TUNNEL}; {RECORDS}; {LOGINS}.\n"
        "  Remedy: take the rest from it in Cloudflare's dashboard (docs/tunnels.md#the-api-token)."
    )

    # Nothing runs the program when a stack is destroyed, and nothing is asked.
    stack.set_token({})
    stack.set_config(stack.settings(delete="media"))
    assert warnings(stack.up()) == []
    assert len(stack.asked()) == 4 * 7 - 7
    stack.set_token({"GET *": 403})
    stack.destroy()
    assert stack.asked() == []
    assert_nothing_is_there(stack)


def test_reading_without_writing_passes_a_preview_and_fails_at_the_resource(tmp_path):
    """As the error says: only reading is tried."""
    stack = Published(tmp_path)
    stack.set_token({"POST zones/*/dns_records": 403})
    assert warnings(stack.preview()) == []
    failed = stack.up("--continue-on-error", check=False)
    assert failed.code != 0
    told = [error for error in errors(failed) if "403 Forbidden" in error]
    assert len(told) == 2
    assert all("dns_records" in error and "Authentication error" in error for error in told)
    stack.set_token({})
    assert planned(stack.up()) == {
        "create DnsRecord a.example.org",
        "create DnsRecord b.example.org",
    }
