"""Verb: the password of a role of PostgreSQL."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
from typing import Any

from hostctl.cluster import parse_json
from hostctl.machine import STATE_DIRECTORY, Machine
from hostctl.protocol import Failure, Result, say
from hostctl.spec import (
    DNS_LABEL,
    POSTGRES_NAME,
    POSTGRES_WORKLOAD,
    Value,
    absolute_path,
    checked,
    or_null,
    text_matching,
)
from hostctl.workloads import cluster_of, run_kubectl

# PostgreSQL's own default, which RFC 7677 asks for at least.
_SCRAM_ITERATIONS = 4096
PASSWORD_SPEC: dict[str, Any] = {
    "kubeconfig": Value(absolute_path),
    "namespace": Value(DNS_LABEL),
    "workload": Value(POSTGRES_WORKLOAD),
    "container": Value(or_null(DNS_LABEL), None),
    "database": Value(POSTGRES_NAME, "postgres"),
    "user": Value(POSTGRES_NAME),
    "role": Value(POSTGRES_NAME),
    # Others would have to be prepared by RFC 4013, which clients do not all do alike.
    "password": Value(text_matching(r"[ -~]{1,1000}", "printable ASCII"), secret=True),
}


def postgres_password(machine: Machine, spec: dict[str, Any]) -> Result:
    """Gives a role another password when it is another than when this last ran; what was seen is
    kept on the host, keyed. Where nothing was seen, a database that runs is given it too, since it
    may have another; one that does not run yet is made with it.

    ALTER ROLE goes to psql's stdin, in the pod and over its local socket, with SCRAM's verifier in
    the place of the password: no argument list, and no log of the server either, holds it.
    """
    wanted = checked(spec, PASSWORD_SPEC, "postgres password")
    namespace, path, role = wanted["namespace"], wanted["kubeconfig"], wanted["role"]
    step = f"changing the password of role {role} in {namespace}/{wanted['workload']}"
    place = f"{STATE_DIRECTORY}/passwords/{cluster_of(machine, path)}"
    ledger = f"{place}/{namespace}.{wanted['workload'].replace('/', '.')}.{role}.json"
    with machine.lock(f"password-{namespace}-{role}"):
        try:
            seen = json.loads(machine.read(ledger))
            key, last = seen["key"], seen["last"]
        except (FileNotFoundError, ValueError, KeyError):
            key, last = machine.nonce() + machine.nonce(), None
        digest = hmac.new(key.encode(), wanted["password"].encode(), "sha256").hexdigest()
        changed = last != digest and (last is not None or _runs(machine, wanted, step))
        if changed:
            say(step)
            _alter_role(machine, wanted, step)
        if last != digest:
            machine.make_directory(os.path.dirname(ledger), 0o700)
            content = json.dumps({"key": key, "last": digest}, sort_keys=True).encode()
            machine.write_atomic(ledger, content, 0o600)
    return {"changed": changed}


def _runs(machine: Machine, wanted: dict[str, Any], step: str) -> bool:
    """Whether a pod of the workload is there to be told. `kubectl exec` waits a minute for one."""
    get = ["get", wanted["workload"], f"--namespace={wanted['namespace']}", "--ignore-not-found"]
    seen = run_kubectl(machine, wanted["kubeconfig"], [*get, "--output=json"], step)
    if seen.code:
        raise Failure("failed", step, seen.complaint, "nothing was changed: run pulumi up again")
    if not seen.out.strip():
        return False
    status = parse_json(seen.out, step).get("status") or {}
    return bool(status.get("readyReplicas")) or status.get("phase") == "Running"


def _alter_role(machine: Machine, wanted: dict[str, Any], step: str) -> None:
    salt = bytes.fromhex(machine.nonce())
    sql = f"ALTER ROLE \"{wanted['role']}\" PASSWORD '{scram_verifier(wanted['password'], salt)}';"
    container = [f"--container={wanted['container']}"] if wanted["container"] else []
    psql = ["psql", "--no-psqlrc", "--quiet", "--no-password", "--set=ON_ERROR_STOP=1"]
    psql += [f"--username={wanted['user']}", f"--dbname={wanted['database']}"]
    namespace = f"--namespace={wanted['namespace']}"
    arguments = ["exec", "--stdin", wanted["workload"], namespace, *container, "--", *psql]
    ran = run_kubectl(machine, wanted["kubeconfig"], arguments, step, input=f"{sql}\n".encode())
    if ran.code:
        # Not all that psql says, which may quote what it was given.
        said = ran.err.decode("utf-8", "replace")
        found = re.search(r"(?:ERROR|FATAL|Error|error)\b[^\n']*", said)
        raise Failure(
            "failed",
            step,
            found.group(0)[:300] if found else f"psql ended with {ran.code}",
            "nothing was changed: correct the Secret's `postgres`, or start the workload, and run "
            "pulumi up again",
        )


def scram_verifier(password: str, salt: bytes) -> str:
    """What PostgreSQL stores of a password (RFC 5803), which it takes in its place."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, _SCRAM_ITERATIONS)
    client = hmac.new(salted, b"Client Key", "sha256").digest()
    parts = hashlib.sha256(client).digest(), hmac.new(salted, b"Server Key", "sha256").digest()
    stored, server = (base64.b64encode(part).decode() for part in parts)
    return f"SCRAM-SHA-256${_SCRAM_ITERATIONS}:{base64.b64encode(salt).decode()}${stored}:{server}"
