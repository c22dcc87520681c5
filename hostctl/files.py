"""Verbs: the kubeconfig and other files of the host."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from hostctl.cluster import Cluster, node_kubeconfig, parse_json
from hostctl.machine import Machine
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, read_record, write_record
from hostctl.spec import (
    ACCOUNT,
    CLUSTER_NAME,
    CONTAINER_NAME,
    DNS_LABEL,
    OBJECT_NAME,
    SECRET_TYPES,
    Items,
    Value,
    absolute_path,
    boolean,
    checked,
    file_mode,
    number_between,
    one_of,
    or_null,
    private_mode,
    server_url,
    text_matching,
)
from hostctl.tools import attempt, tool_remedy
from hostctl.waiting import present_cluster, restart_container


def next_certificate_generation(
    machine: Machine,
    record: Mapping[str, Any],
    cluster: Cluster,
    credentials: Mapping[str, str] | None,
) -> int:
    """Like the generation, for the kubeconfig file against what the node holds now."""
    written = record.get("kubeconfig")
    if not written:
        return 1 if cluster.state == "absent" else 0
    generation = written["generation"]
    if cluster.state == "absent":
        return generation + 1
    if credentials is None:
        return generation
    wanted = render_kubeconfig(cluster.name, credentials, written["server"]).encode()
    if hashlib.sha256(wanted).hexdigest() != written["sha256"]:
        return generation + 1
    return generation if _is_in_place(machine, written, wanted) else generation + 1


def _is_in_place(machine: Machine, file: Mapping[str, Any], content: bytes) -> bool:
    """Whether the file holds the content with its mode, owner and group. A file that may not be
    read counts as in place: on cannot tell the last answer is kept."""
    try:
        seen = machine.stat(file["path"])
        if seen is None:
            return False
        wanted = (file_mode(file["mode"]), file["owner"], file["group"])
        return (seen.mode, seen.owner, seen.group) == wanted and machine.read(
            file["path"]
        ) == content
    except OSError:
        return True


KUBECONFIG_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "path": Value(absolute_path),
    "owner": Value(ACCOUNT, "root"),
    "group": Value(ACCOUNT, "wheel"),
    "mode": Value(lambda value: f"{private_mode(value):04o}", "0640"),
    "directory_mode": Value(lambda value: f"{private_mode(value):04o}", "0750"),
    "server": Value(server_url),
    "generation": Value(or_null(number_between(0, 2**31)), None),
}


def render_kubeconfig(
    name: str, credentials: Mapping[str, str], server: str, kind: str = "k3d"
) -> str:
    """The kubeconfig for clients, with the names that k3d gives, or those of another kind of
    cluster. Equal input, equal text."""
    return (
        "apiVersion: v1\n"
        "clusters:\n"
        "- cluster:\n"
        f"    certificate-authority-data: {credentials['ca']}\n"
        f"    server: {server}\n"
        f"  name: {kind}-{name}\n"
        "contexts:\n"
        "- context:\n"
        f"    cluster: {kind}-{name}\n"
        f"    user: admin@{kind}-{name}\n"
        f"  name: {kind}-{name}\n"
        f"current-context: {kind}-{name}\n"
        "kind: Config\n"
        "preferences: {}\n"
        "users:\n"
        f"- name: admin@{kind}-{name}\n"
        "  user:\n"
        f"    client-certificate-data: {credentials['certificate']}\n"
        f"    client-key-data: {credentials['key']}\n"
    )


def kubeconfig(machine: Machine, spec: dict[str, Any]) -> Result:
    """Reads the kubeconfig out of the cluster, writes it for the host's people, and returns it.

    The server address is the one given (incident 14). The file appears whole, with its final mode
    and owner; its directory is made if there is none and left as it is if there is one.
    """
    wanted = checked(spec, KUBECONFIG_SPEC, "kubeconfig")
    name, path = wanted["cluster"], wanted["path"]
    step = f"writing the kubeconfig of cluster {name}"
    _refuse_missing_account(machine, step, wanted["owner"], wanted["group"])
    with cluster_lock(machine, name):
        cluster = present_cluster(machine, name, "reading the kubeconfig of")
        credentials = node_kubeconfig(machine, cluster)
        if credentials is None:
            raise Failure(
                "failed",
                step,
                f"{cluster.first.name} has written no kubeconfig yet",
                f"hostctl k3d start {name}",
            )
        text = render_kubeconfig(name, credentials, wanted["server"])
        file = {key: wanted[key] for key in ("path", "owner", "group", "mode", "server")}
        if not _is_in_place(machine, file, text.encode()):
            account = (wanted["owner"], wanted["group"])
            directory_mode = int(wanted["directory_mode"], 8)
            machine.make_directory(os.path.dirname(path), directory_mode, *account)
            machine.write_atomic(path, text.encode(), int(wanted["mode"], 8), *account)
        recorded = read_record(machine, name).get("kubeconfig") or {}
        digest = hashlib.sha256(text.encode()).hexdigest()
        generation = wanted["generation"]
        if generation is None:
            # By hand: a stack that has not seen this certificate finds another generation.
            rotated = recorded.get("sha256", digest) != digest
            generation = recorded.get("generation", 0) + rotated
        entry = {**file, "sha256": digest, "generation": generation}
        entry["directory_mode"] = wanted["directory_mode"]
        if entry != recorded:
            write_record(machine, name, kubeconfig=entry)
        if recorded.get("path", path) != path:
            remove_kubeconfig(machine, recorded)
    return {"kubeconfig": text, "path": path, "context": f"k3d-{name}"}


def remove_kubeconfig(machine: Machine, written: Mapping[str, Any]) -> None:
    """Removes the kubeconfig file of a record, unless somebody has put another content there."""
    with contextlib.suppress(FileNotFoundError):
        content = machine.read(written["path"])
        if hashlib.sha256(content).hexdigest() == written["sha256"]:
            machine.remove(written["path"])


def _refuse_missing_account(machine: Machine, step: str, owner: str, group: str) -> None:
    missing = machine.missing_account(owner, group)
    if missing:
        raise Failure(
            "refused",
            step,
            f"this host has no {missing}",
            "make it, or name another one in the settings (Debian's administrators are the group "
            "sudo, those of NixOS and TrueNAS SCALE wheel and builtin_administrators)",
        )


FILES_SPEC: dict[str, Any] = {
    "files": Items(
        {
            "path": Value(absolute_path),
            "as": Value(one_of("value", "manifest"), "value"),
            "namespace": Value(DNS_LABEL),
            "name": Value(OBJECT_NAME),
            "type": Value(one_of(*SECRET_TYPES), "Opaque"),
            "keys": Items(Value(text_matching(r"[-._a-zA-Z0-9]{1,253}", "a key of a Secret")), []),
            "optional": Value(boolean, False),
        }
    )
}


def files_read(machine: Machine, spec: dict[str, Any]) -> Result:
    """Reads files that another tool has decrypted (agenix, sops): each is present, absent or
    unreadable."""
    files: dict[str, Any] = {}
    made_up = []
    for request in checked(spec, FILES_SPEC, "files read")["files"]:
        path = request["path"]
        try:
            content: bytes | None = machine.read(path)
        except FileNotFoundError:
            content = machine.missing_file(request)
            if content is not None:
                made_up.append(path)
        except OSError as error:
            detail = f"cannot be read: {error.strerror or error}"
            files[path] = {"state": "unreadable", "content": None, "detail": detail}
            continue
        if content is None:
            files[path] = {"state": "absent", "content": None, "detail": "there is no such file"}
        else:
            text = base64.b64encode(content).decode()
            detail = "made up" if path in made_up else f"{len(content)} bytes"
            files[path] = {"state": "present", "content": text, "detail": detail}
    return {"files": files, "made_up": made_up}


WRITE_SPEC: dict[str, Any] = {
    "path": Value(absolute_path),
    "content": Value(
        text_matching(r"(?s).{0,1000000}", "text of up to 1,000,000 characters"), secret=True
    ),
    "mode": Value(private_mode, 0o600),
    "owner": Value(ACCOUNT, "root"),
    "group": Value(ACCOUNT, "root"),
    "restart_container": Value(or_null(CONTAINER_NAME), None),
}


def files_write(machine: Machine, spec: dict[str, Any]) -> Result:
    """Writes a file with its final mode, and restarts a container that read an older one."""
    wanted = checked(spec, WRITE_SPEC, "files write")
    path, content = wanted["path"], wanted["content"].encode()
    step = f"writing {path}"
    account = (wanted["owner"], wanted["group"])
    _refuse_missing_account(machine, step, *account)
    with _file_lock(machine, path):
        seen = machine.stat(path)
        changed = seen is None or machine.read(path) != content
        if changed:
            machine.make_directory(os.path.dirname(path), 0o755)
            machine.write_atomic(path, content, wanted["mode"], *account)
        elif seen and (seen.mode, seen.owner, seen.group) != (wanted["mode"], *account):
            machine.set_access(path, wanted["mode"], *account)
        container = wanted["restart_container"]
        restarted = bool(container) and _restart_older(machine, container, path, step)
    return {"changed": changed, "restarted": restarted}


def files_remove(machine: Machine, spec: dict[str, Any]) -> Result:
    """Removes a file that `files write` wrote; one that is absent is fine."""
    # The spec is the one of a stored write, perhaps of another version: only the path counts.
    wanted = {key: spec[key] for key in ("path",) if key in spec}
    path = checked(wanted, {"path": Value(absolute_path)}, "files remove")["path"]
    with _file_lock(machine, path):
        return {"removed": machine.remove(path)}


def _file_lock(machine: Machine, path: str) -> contextlib.AbstractContextManager[None]:
    return machine.lock("file-" + hashlib.sha256(path.encode()).hexdigest()[:16])


def _restart_older(machine: Machine, container: str, path: str, step: str) -> bool:
    """Restarts the container if it runs since before the file was written. By the clock and not by
    what this run did: a run that is killed before the restart leaves it to the next."""
    argv = ["docker", "inspect", "--type", "container", container]
    seen = attempt(machine, argv, step)
    if seen.code:
        if "No such" in seen.complaint:
            return False
        raise Failure("cannot-tell", step, seen.complaint, tool_remedy("docker", seen))
    state = parse_json(seen.out, step)[0]["State"]
    written = machine.stat(path)
    if state["Status"] != "running" or written is None:
        return False
    # Docker writes up to nanoseconds, strptime reads up to microseconds.
    text = f"{state['StartedAt'].rstrip('Z')[:26]}+0000"
    form = "%Y-%m-%dT%H:%M:%S.%f%z" if "." in text else "%Y-%m-%dT%H:%M:%S%z"
    if datetime.strptime(text, form).timestamp() > written.modified:
        return False
    say(f"restarting {container}, which reads {path}")
    restart_container(machine, container)
    return True
