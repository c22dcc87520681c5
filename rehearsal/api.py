"""Stand-in for what a program asks of Cloudflare's API itself: what its token may read.

One server of this process, on loopback, answers for every rehearsal: the address names directory
and stack. The token is made up. It may do exactly what the tunnels of the stack file need, unless
`token.json` of the directory says otherwise: status by pattern (fnmatch) of `METHOD path`, the
first that fits; for `GET zones` also the names of the zones that are listed:

    {"GET user/tokens": 200, "GET zones": ["example.net"], "POST zones/*/dns_records": 403}

What changes something is asked of the provider, whose stand-in looks here too. `asked.txt` of the
directory has a line a request.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

_BELOW = "/client/v4/"

# By path, the least and the most of `per_page`.
_LISTS = {
    "accounts/*/access/apps": (1, 1000),
    "accounts/*/cfd_tunnel": (1, 1000),
    "accounts/*/members": (5, 50),
    "accounts/*/tokens": (5, 50),
    "user/tokens": (5, 50),
    "zones": (5, 50),
    "zones/*/dns_records": (1, 5_000_000),
}
_WRONG = {
    400: (7003, "Could not route to /client/v4/{path}, perhaps your object identifier is invalid?"),
    401: (1000, "Invalid API Token"),
    403: (10000, "Authentication error"),
    404: (7000, "No route for that URI"),
    429: (971, "Please wait and consider throttling your request speed"),
    500: (10001, "Internal server error"),
    503: (10013, "Service unavailable"),
}
_ZONES_REFUSED = (
    0,
    "Actor 'com.cloudflare.api.token.made-up' requires permission"
    " 'com.cloudflare.api.account.zone.list' to list zones",
)


def address(directory: Path, stack: str) -> str:
    """Where the stand-in answers for a stack that is rehearsed in a directory."""
    place = quote(f"{directory}/{stack}")
    return f"http://127.0.0.1:{_server().server_port}{place}{_BELOW.rstrip('/')}"


def says(directory: Path, method: str, path: str) -> Any:
    """What `token.json` says of a request; None where it is silent."""
    file = directory / "token.json"
    said = json.loads(file.read_text()) if file.exists() else {}
    fits = (said[p] for p in said if fnmatch.fnmatchcase(f"{method} {path}", p))
    return next(fits, None)


def refusal(status: int, path: str) -> dict[str, Any]:
    """The body with which the API refuses a request."""
    code, message = _ZONES_REFUSED if (status, path) == (403, "zones") else _WRONG[status]
    error = {"code": code, "message": message.replace("{path}", path)}
    return {"success": False, "errors": [error], "messages": [], "result": None}


class _Stack:
    """What the stack file says of Cloudflare."""

    def __init__(self, directory: Path, name: str) -> None:
        file = directory / "project" / f"Pulumi.{name}.yaml"
        config = yaml.safe_load(file.read_text()).get("config") or {}
        self._account: dict[str, Any] = config.get("homelab:cloudflare") or {}
        self._tunnels: dict[str, Any] = config.get("homelab:tunnels") or {}

    def needed(self) -> set[str]:
        """The lists that a token with just what the tunnels need can read."""
        if not self._tunnels:
            return set()
        id, zones = self._account["accountId"], self._account["zones"]
        found = {f"accounts/{id}/cfd_tunnel"}
        for route in (route for one in self._tunnels.values() for route in one.get("routes") or []):
            if route.get("access"):
                found.add(f"accounts/{id}/access/apps")
            holding = [zone for zone in zones if f".{route['hostname']}".endswith(f".{zone}")]
            found.add(f"zones/{zones[max(holding, key=len)]}/dns_records")
        return found

    def zones(self, names: Iterable[str]) -> list[dict[str, str]]:
        """Zones as they are listed: the stack's own with their ids, others with made-up ones."""
        own: dict[str, str] = self._account["zones"]
        return [
            {"id": own.get(name) or hashlib.md5(name.encode()).hexdigest(), "name": name}
            for name in names
        ]


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        place, below, path = parts.path.partition(_BELOW)
        directory, stack = Path(unquote(place)).parent, Path(unquote(place)).name
        if not below or not (directory / "project" / f"Pulumi.{stack}.yaml").exists():
            self._answer(404, refusal(404, path))
            return
        with (directory / "asked.txt").open("a") as asked:
            asked.write(f"GET {path}\n")
        status, result = self._status(directory, stack, path, parse_qs(parts.query))
        if status == 200:
            body = {"success": True, "errors": [], "messages": [], "result": result}
        else:
            body = refusal(status, path)
        self._answer(status, body)

    def _status(
        self, directory: Path, stack: str, path: str, query: Mapping[str, list[str]]
    ) -> tuple[int, list[dict[str, str]]]:
        bounds = next((b for p, b in _LISTS.items() if _is(path, p)), None)
        if bounds is None or query.keys() - {"per_page"}:
            return 404, []
        count = query.get("per_page", ["20"])[0]
        if not count.isdecimal() or not bounds[0] <= int(count) <= bounds[1]:
            return 400, []
        if not re.fullmatch("Bearer [A-Za-z0-9_-]{40,}", self.headers.get("Authorization", "")):
            return 401, []
        ids = [part for part in path.split("/")[1:2] if path != "user/tokens"]
        if not all(re.fullmatch("[0-9a-f]{32}", id) for id in ids):
            return 400, []
        said = says(directory, "GET", path)
        if isinstance(said, list):
            return 200, _Stack(directory, stack).zones(said)
        return said or (200 if path in _Stack(directory, stack).needed() else 403), []

    def _answer(self, status: int, body: Mapping[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Said in asked.txt."""


def _is(path: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]+"), path) is not None


@functools.cache
def _server() -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
