"""The age of a cluster's certificates, and the clocks that judge them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple

from hostctl.cluster import Cluster
from hostctl.live import api_address, live_api
from hostctl.machine import Machine, Served

EXPIRES_SOON_DAYS = 30
SKEW_SECONDS = 5.0
DAY_SECONDS = 86400


class Validity(NamedTuple):
    """From when to when a certificate is valid, in seconds since 1970."""

    begins: float
    ends: float


def validity_of(certificate: bytes) -> Validity:
    """Reads it from a certificate in DER (RFC 5280, 4.1). Raises ValueError."""
    body, _ = _element(certificate, 0x30)
    rest, _ = _element(body, 0x30)
    if rest[:1] == b"\xa0":
        _, rest = _element(rest, 0xA0)
    for tag in (0x02, 0x30, 0x30):
        # Serial number, signature algorithm, issuer.
        _, rest = _element(rest, tag)
    times, _ = _element(rest, 0x30)
    begins, times = _time(times)
    ends, _ = _time(times)
    return Validity(begins, ends)


def _element(data: bytes, tag: int) -> tuple[bytes, bytes]:
    """Content of the first element, which must have this tag, and what is after it."""
    if len(data) < 2 or data[0] != tag:
        raise ValueError("not a certificate")
    length, start = data[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(data[2:start], "big")
    if start + length > len(data):
        raise ValueError("a certificate that is cut off")
    return data[start : start + length], data[start + length :]


def _time(data: bytes) -> tuple[float, bytes]:
    generalized = data[:1] == b"\x18"
    text, rest = _element(data, 0x18 if generalized else 0x17)
    # UTCTime has years from 1950 to 2049, which %y reads as 1969 to 2068.
    form = "%Y%m%d%H%M%SZ" if generalized else "%y%m%d%H%M%SZ"
    read = datetime.strptime(text.decode("ascii", "replace"), form)
    return read.replace(tzinfo=timezone.utc).timestamp(), rest


def certificate_warnings(
    machine: Machine, cluster: Cluster, credentials: Mapping[str, str] | None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Facts of the API's certificates and of its clock, and what a person should do about them:
    pairs of what and remedy. What cannot be seen is None."""
    name = cluster.name
    api = (api_address(cluster), live_api(cluster)["port"])
    running = cluster.state == "running"
    seen, served = certificates_of(machine, api if running else None, credentials)
    now = machine.now()
    facts: dict[str, Any] = {
        f"{use}_certificate_ends": _utc_day(one.ends) if one else None for use, one in seen.items()
    }
    found = []
    for use, one in seen.items():
        if one is None:
            continue
        if now < one.begins:
            found.append(
                (
                    f"the {use} certificate of cluster {name} is valid from {_utc_day(one.begins)} "
                    f"on, and the host's clock says {_utc_day(now)}",
                    "set the host's clock: timedatectl status",
                )
            )
        elif one.ends - now < EXPIRES_SOON_DAYS * DAY_SECONDS:
            ended = "ended" if one.ends <= now else "ends"
            found.append(
                (
                    f"the {use} certificate of cluster {name} {ended} on {_utc_day(one.ends)}",
                    f"hostctl k3d stop {name}; hostctl k3d start {name}: k3s renews at its start "
                    "what has less than 90 days left; then pulumi up writes the kubeconfig",
                )
            )
    skew = served.date - now if served and served.date is not None else None
    facts["clock_skew_seconds"] = None if skew is None else round(skew)
    # A Date has whole seconds.
    if skew is not None and abs(skew) > SKEW_SECONDS + 1:
        found.append(
            (
                f"the clock of cluster {name} is {abs(skew):.0f} s "
                f"{'ahead of' if skew > 0 else 'behind'} the host's",
                "set both by NTP: Docker runs in a virtual machine whose clock drifted; restart it",
            )
        )
    return facts, found


def certificates_of(
    machine: Machine, api: tuple[str, int] | None, credentials: Mapping[str, str] | None
) -> tuple[dict[str, Validity | None], Served | None]:
    """When the certificate that the API at an address and port shows and the administrator's are
    valid, and what the API served. What cannot be seen is None."""
    served = machine.served(*api) if api else None
    seen = {
        "serving": _validity(served.certificate if served else b""),
        "client": _validity(_decoded((credentials or {}).get("certificate", ""))),
    }
    return seen, served


def _decoded(pem: str) -> bytes:
    """DER of the first certificate in base64 of PEM, as a kubeconfig has it; empty if none."""
    try:
        text = base64.b64decode(pem).decode("ascii", "replace")
        block = re.search(r"-----BEGIN CERTIFICATE-----(.*?)-----END", text, re.DOTALL)
        return base64.b64decode(block.group(1)) if block else b""
    except binascii.Error:
        return b""


def _validity(certificate: bytes) -> Validity | None:
    try:
        return validity_of(certificate)
    except ValueError:
        return None


def _utc_day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
