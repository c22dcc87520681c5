"""What hostctl last did, kept on the host: a cluster's record."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from hostctl.machine import STATE_DIRECTORY, Machine
from hostctl.protocol import Failure


def read_record(machine: Machine, name: str) -> dict[str, Any]:
    """What was last done for the cluster; empty when nothing is recorded."""
    path = f"{STATE_DIRECTORY}/clusters/{name}.json"
    try:
        record = json.loads(machine.read(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Failure(
            "cannot-tell",
            f"reading the record of cluster {name}",
            f"{path}: {error}",
            "read it as root; a damaged one may be moved away: the next up records anew",
        ) from None
    return record if isinstance(record, dict) else {}


def write_record(machine: Machine, name: str, **changes: Any) -> dict[str, Any]:
    """Changes parts of the record; the caller holds the cluster's lock."""
    record = {**read_record(machine, name), **changes}
    path = f"{STATE_DIRECTORY}/clusters/{name}.json"
    machine.make_directory(os.path.dirname(path), 0o755)
    content = json.dumps(record, indent=1, sort_keys=True).encode() + b"\n"
    # It holds no secret, and a preview without sudo reads it.
    machine.write_atomic(path, content, 0o644)
    return record


def record_run(machine: Machine, name: str, what: str, at: str, cause: str) -> None:
    """Notes how a scheduled verb ended; ``cause`` is empty when all went well. The caller holds the
    cluster's lock."""
    runs = read_record(machine, name).get("runs") or {}
    write_record(machine, name, runs={**runs, what: {"at": at, "ok": not cause, "cause": cause}})


def cluster_lock(machine: Machine, name: str) -> contextlib.AbstractContextManager[None]:
    return machine.lock(f"cluster-{name}")


def next_generation(record: Mapping[str, Any], agrees: bool) -> int:
    """The generation for `ensure`: the recorded one while live agrees with declared, one more while
    it does not, so that healing once leaves nothing to do (design rule 3)."""
    recorded = record.get("generation")
    if recorded is None:
        return 0 if agrees else 1
    return recorded if agrees else recorded + 1
