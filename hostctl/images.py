"""Verbs: images from files, for hosts without a registry."""

from __future__ import annotations

from typing import Any

from hostctl.cluster import look
from hostctl.machine import Machine
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, read_record, write_record
from hostctl.spec import (
    CLUSTER_NAME,
    INCARNATION,
    Items,
    Value,
    absolute_path,
    checked,
    or_null,
    text_matching,
)
from hostctl.tools import run_tool
from hostctl.waiting import present_cluster

IMPORT_SECONDS = 3600.0
DIGEST_SPEC: dict[str, Any] = {"files": Items(Value(absolute_path))}
IMPORT_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "files": Items(
        {
            "path": Value(absolute_path),
            "sha256": Value(text_matching(r"[0-9a-f]{64}", "a sha256 in hex")),
        }
    ),
    # Not read: a node of another making or image has none of these images.
    "incarnation": Value(or_null(INCARNATION), None),
    "image": Value(or_null(text_matching(r"[^\x00-\x20]+", "the nodes' image")), None),
}


def images_digest(machine: Machine, spec: dict[str, Any]) -> Result:
    """The digest of each archive of images."""
    files = checked(spec, DIGEST_SPEC, "images digest")["files"]
    return {"files": [{"path": path, "sha256": _digest(machine, path)} for path in files]}


def images_import(machine: Machine, spec: dict[str, Any]) -> Result:
    """Imports archives of images into every node that does not have them yet."""
    wanted = checked(spec, IMPORT_SPEC, "images import")
    name, imported = wanted["cluster"], []
    with cluster_lock(machine, name):
        nodes = present_cluster(machine, name, "importing images into").of("server", "agent")
        held = read_record(machine, name).get("images") or {}
        for file in wanted["files"]:
            path, digest = file["path"], file["sha256"]
            step = f"importing {path}"
            if _digest(machine, path) != digest:
                cause = "it is another file than the preview saw"
                raise Failure("refused", step, cause, "run preview and up again")
            for node in nodes:
                if node.facts["Id"] in held.get(digest, []):
                    continue
                say(f"{step} into {node.name}")
                argv = ["docker", "exec", "--interactive", node.name]
                argv += ["ctr", "--namespace", "k8s.io", "images", "import", "-"]
                run_tool(machine, argv, step, "failed", from_file=path, timeout=IMPORT_SECONDS)
                held[digest] = [*held.get(digest, []), node.facts["Id"]]
                write_record(machine, name, images=held)
                imported.append({"path": path, "node": node.name})
        # Of nodes and files that are gone nothing needs to be known.
        there = {node.facts["Id"] for node in look(machine, name).nodes}
        kept = {
            file["sha256"]: [one for one in held.get(file["sha256"], []) if one in there]
            for file in wanted["files"]
        }
        if kept != held:
            write_record(machine, name, images=kept)
    return {"imported": imported}


def _digest(machine: Machine, path: str) -> str:
    step = f"reading {path}"
    seen = machine.stat(path)
    if seen is None or seen.kind != "file":
        cause = "there is no such file on the host"
        raise Failure("refused", step, cause, "correct cluster.imageFiles, or put the file there")
    return machine.checksum(path)
