"""What the API token of Cloudflare may do, against what the stack's tunnels need.

A token cannot read its own permissions (that takes one more, API Tokens Read), and only writing
tells Edit from Read. So this reads: each list that the stack's resources are in, which a token that
can manage them can read, and some that no stack needs, which a least token is refused.

It asks Cloudflare's API itself. By a function of the provider each of those refusals, which are
what is hoped for, would be shown as an error of the run (pulumi-terraform-bridge, logDiagnostic),
and where nothing answers it would try for minutes (cloudflare-go tries ten times more).
"""

import http.client
import json
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pulumi

from components import settings

_SECONDS = 10
"""How long one answer is waited for."""

_ZONES = "zones?per_page=50"
"""The zones that the token sees: its own too, so that only others tell of too much."""

_SETTING = "homelab:cloudflare.apiToken"
_PAGE = "docs/tunnels.md#the-api-token"


@dataclass(frozen=True)
class Read:
    """One thing that a token may be able to read."""

    path: str
    """Below the API's address, with a query."""
    permission: str
    """The permission that reads it, as the dashboard names it, and where it holds."""
    needed_for: str = ""
    """What of the stack needs it; empty for what no stack needs."""


class Answer(NamedTuple):
    """What Cloudflare said to a :class:`Read`."""

    state: str
    """`may`, `refused`, or `unseen` where nothing tells which."""
    detail: str = ""
    """Why it is not `may`, in Cloudflare's words."""
    result: Any = None


def reads(
    account: settings.Cloudflare, tunnels: Mapping[str, settings.Tunnel]
) -> tuple[list[Read], list[Read]]:
    """What the token must be able to read for these tunnels, and what it must not."""
    id = account.account_id
    hostnames = {name: who for tunnel in tunnels.values() for name, who in tunnel.access.items()}
    zones = sorted({account.zone(hostname) for hostname in hostnames})
    gated = sorted(hostname for hostname, who in hostnames.items() if who)
    tunnel = Read(
        f"accounts/{id}/cfd_tunnel?per_page=1",
        f"Account {id}: Cloudflare Tunnel Edit",
        f"tunnel {_some(sorted(tunnels))}",
    )
    records = [
        Read(
            f"zones/{account.zones[zone]}/dns_records?per_page=1",
            f"Zone {zone} ({account.zones[zone]}): DNS Edit",
            "the records of its routes",
        )
        for zone in zones
    ]
    more = [
        Read("user/tokens?per_page=5", "User: API Tokens Read"),
        Read(f"accounts/{id}/tokens?per_page=5", f"Account {id}: Account API Tokens Read"),
        Read(f"accounts/{id}/members?per_page=5", f"Account {id}: Account Settings Read"),
        Read(_ZONES, "Zone Read"),
    ]
    apps = f"accounts/{id}/access/apps?per_page=1"
    logins = f"Account {id}: Access: Apps and Policies"
    if gated:
        needed = Read(apps, f"{logins} Edit", f"access of {_some(gated)}")
        return [tunnel, *records, needed], more
    return [tunnel, *records], [Read(apps, f"{logins} Read"), *more]


class Permissions:
    """What a token may do, asked from the moment this is made, all at once and beside all else."""

    def __init__(
        self, account: settings.Cloudflare, tunnels: Mapping[str, settings.Tunnel]
    ) -> None:
        self._account = account
        token = account.api_token.get_secret_value()
        self._needed, self._more = reads(account, tunnels)
        asked = [*self._needed, *self._more]
        pool = ThreadPoolExecutor(len(asked))
        secure = urllib.request.HTTPSHandler(context=ssl.create_default_context())
        opener = urllib.request.build_opener(_Direct, secure)
        self._answers: dict[Read, Future[Answer]] = {
            read: pool.submit(_ask, opener, read.path, token) for read in asked
        }
        pool.shutdown(wait=False)

    @classmethod
    def read(cls, stack: settings.Settings) -> "Permissions | None":
        """None for a stack without tunnels: nothing is asked."""
        if not stack.tunnels or stack.cloudflare is None:
            return None
        return cls(stack.cloudflare, stack.tunnels)

    def check(self) -> None:
        """Warns of what the token may do beyond the need, and of what could not be seen.

        Raises RunError with all that it needs and is refused.
        """
        answers = {read: future.result() for read, future in self._answers.items()}
        if surplus := list(self._surplus(answers)):
            pulumi.log.warn(
                f"{_SETTING}: the token may do more than this stack needs:\n"
                + "\n".join(f"  {permission}" for permission in surplus)
                + f"\n  Allowed: {self._allowed}.\n  Remedy: take the rest from it in Cloudflare's"
                f" dashboard ({_PAGE})."
            )
        unseen = [answer for answer in answers.values() if answer.state == "unseen"]
        if unseen:
            details = dict.fromkeys(answer.detail for answer in unseen)
            pulumi.log.warn(
                f"{_SETTING}: {len(unseen)} of {len(answers)} looks at what the token may do got no"
                " answer from Cloudflare, so that a wrong permission shows at the resource that"
                f" needs it: {'; '.join(details)}"
            )
        refused = [read for read in self._needed if answers[read].state == "refused"]
        if refused:
            raise pulumi.RunError(
                f"{_SETTING}: {len(refused)} permission(s) that this stack needs are refused by"
                " Cloudflare; nothing was changed:\n"
                + "\n".join(
                    f"  {read.permission}, for {read.needed_for}: {answers[read].detail}"
                    for read in refused
                )
                + f"\n  Allowed: {self._allowed}.\n  Remedy: give the token what is missing in"
                " Cloudflare's dashboard, or mend homelab:cloudflare.accountId or zones if an id is"
                f" wrong ({_PAGE}). Only reading is tried: Read instead of Edit fails at the"
                " resource."
            )

    @property
    def _allowed(self) -> str:
        return "a token with " + "; ".join(read.permission for read in self._needed)

    def _surplus(self, answers: Mapping[Read, Answer]) -> Iterator[str]:
        for read in self._more:
            if answers[read].state != "may":
                continue
            if read.path != _ZONES:
                yield read.permission
            elif others := _others(answers[read].result, self._account.zones.values()):
                yield f"Zone {_some(others)}: {read.permission}"


def _others(result: Any, own: Iterable[str]) -> list[str]:
    """The names of the zones that are not the stack's own, by their ids."""
    known = set(own)
    others = [zone for zone in _objects(result) if str(zone.get("id")) not in known]
    return sorted(_printable(str(zone.get("name"))) for zone in others)


def _objects(told: Any) -> list[dict[str, Any]]:
    return [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


class _Direct(urllib.request.HTTPRedirectHandler):
    """The token goes to this address and no other."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


def _ask(opener: urllib.request.OpenerDirector, path: str, token: str) -> Answer:
    # The provider's own variable for another address.
    base = os.environ.get("CLOUDFLARE_BASE_URL") or "https://api.cloudflare.com/client/v4"
    # Cloudflare bans the name by which Python's client calls itself.
    headers = {"Authorization": f"Bearer {token}", "User-Agent": "homelab"}
    try:
        request = urllib.request.Request(f"{base.rstrip('/')}/{path}", headers=headers)
        try:
            with opener.open(request, timeout=_SECONDS) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as refusal:
            with refusal:
                status, content = refusal.code, refusal.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Answer("unseen", _printable(str(getattr(error, "reason", "") or error)))
    # Nobody has a reason to repeat it; what is said here is shown.
    return _understood(status, content.replace(token.encode(), b"[secret]"))


def _understood(status: int, content: bytes) -> Answer:
    """Only what Cloudflare's API answers in its own form counts, not what a proxy says for it."""
    try:
        told = json.loads(content)
    except ValueError:
        told = None
    if not isinstance(told, dict) or not isinstance(told.get("success"), bool):
        return Answer("unseen", f"status {status}, not in the form of Cloudflare's API")
    if status == 200 and told["success"]:
        return Answer("may", result=told.get("result"))
    errors = _objects(told.get("errors"))
    said = "; ".join(f"{error.get('message')} ({error.get('code')})" for error in errors)
    detail = _printable(f"{status} {said}".strip())
    # 408 and 429 say when it was asked, not who asked.
    if 400 <= status < 500 and status not in (408, 429):
        return Answer("refused", detail)
    return Answer("unseen", detail)


def _printable(text: str) -> str:
    return re.sub(r"[^ -~]+", " ", text)[:200]
