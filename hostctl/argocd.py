"""Verbs: the GitOps repository that ArgoCD starts from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hostctl.machine import PROGRESS_SECONDS, Machine, Ran, TookTooLong, ToolMissing
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, read_record, write_record
from hostctl.spec import (
    CLUSTER_NAME,
    COMMIT,
    DNS_LABEL,
    Value,
    absolute_path,
    checked,
    git_ref,
    git_repository,
    or_null,
    path_in_repository,
)
from hostctl.tools import tool_version
from hostctl.workloads import FIELD_MANAGER, run_kubectl

RESOLVE_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "repository": Value(git_repository),
    "ref": Value(git_ref, "main"),
    "path": Value(path_in_repository, "bootstrap"),
    "commit": Value(or_null(COMMIT), None),
}


def argocd_resolve(machine: Machine, spec: dict[str, Any]) -> Result:
    """The commit that a ref names now, and the commit that was applied last. A repository that
    cannot be reached and a ref that it does not have are two answers; neither is an error."""
    wanted = checked(spec, RESOLVE_SPEC, "argocd resolve")
    for tool in ("git", "kubectl"):
        # `argocd apply` needs both; here they are missed before anything is changed.
        tool_version(machine, tool)
    record = read_record(machine, wanted["cluster"])
    result = {"state": "resolved", "commit": None, "detail": "", "applied": record.get("argocd")}
    ref = wanted["ref"]
    pinned = wanted["commit"] or (ref if re.fullmatch("[0-9a-f]{40}", ref) else None)
    if pinned:
        return {**result, "commit": pinned, "detail": "the settings name the commit"}
    # Tags before branches, as `git fetch` resolves a short name; ^{} is the commit of a tag object.
    names = [ref, f"{ref}^{{}}"]
    if not ref.startswith("refs/"):
        names = [f"refs/{kind}/{ref}{peel}" for kind in ("tags", "heads") for peel in ("", "^{}")]
    ran = _git(machine, ["ls-remote", "--", wanted["repository"], *names])
    if isinstance(ran, str) or ran.code:
        detail = ran if isinstance(ran, str) else ran.complaint
        return {**result, "state": "unreachable", "detail": detail}
    rows = (line.split("\t", 1) for line in ran.text.splitlines() if "\t" in line)
    found = {name: commit for commit, name in rows}
    for name in sorted(names, key=lambda name: (name.startswith("refs/heads/"), "^" not in name)):
        if re.fullmatch("[0-9a-f]{40}", found.get(name, "")):
            return {**result, "commit": found[name], "detail": name.replace("^{}", "")}
    detail = f"the repository has no branch or tag {ref}"
    return {**result, "state": "no-such-ref", "detail": detail}


def _git(machine: Machine, arguments: Sequence[str]) -> Ran | str:
    """Runs git so that it neither asks nor waits; a string says why it got no answer."""
    env = {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": "https:ssh",
        "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=10",
    }
    try:
        return machine.run(["git", *arguments], env=env, timeout=20.0)
    except TookTooLong:
        return "no answer in 20 s"
    except ToolMissing:
        return "git is no longer on PATH"


APPLY_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "kubeconfig": Value(absolute_path),
    "repository": Value(git_repository),
    "path": Value(path_in_repository, "bootstrap"),
    "commit": Value(COMMIT),
    "namespace": Value(DNS_LABEL, "argocd"),
}
_APPLY_TRIES = 6
_NOT_YET = re.compile(r"no matches for kind|ensure CRDs are installed first|failed calling webhook")


def argocd_apply(machine: Machine, spec: dict[str, Any]) -> Result:
    """Applies the bootstrap kustomization at a commit, server-side; deletes nothing that an earlier
    commit applied.

    Conflicts are forced: the other owner of a field is the client-side apply that this replaces, or
    ArgoCD, which reads the same repository (Argo CD's own manual installs it so). kubectl then
    moves what a client-side apply owned to our field manager, so that a field that leaves the
    repository leaves the cluster (kubernetes/kubernetes#99003). CRDs of 256 KiB and more need
    server-side apply anyway.
    """
    wanted = checked(spec, APPLY_SPEC, "argocd apply")
    path, commit = wanted["kubeconfig"], wanted["commit"]
    ran = Ran(1, b"", b"")
    for tool in ("git", "kubectl"):
        tool_version(machine, tool)
    step = f"applying {wanted['repository']}//{wanted['path']} at {commit}"
    target = f"{wanted['repository']}//{wanted['path']}?ref={commit}&timeout=120s"
    arguments = ["apply", f"--kustomize={target}", "--server-side", "--force-conflicts"]
    arguments += [f"--field-manager={FIELD_MANAGER}", "--output=name"]
    for attempt in range(1, _APPLY_TRIES + 1):
        ran = run_kubectl(machine, path, arguments, step, timeout=600.0)
        if ran.code == 0:
            break
        complaint = ran.err.decode("utf-8", "replace")
        if not _NOT_YET.search(complaint) or attempt == _APPLY_TRIES:
            raise Failure("failed", step, ran.complaint, _apply_remedy(complaint, wanted))
        say(f"{step}: not all kinds are served yet, try {attempt} of {_APPLY_TRIES}")
        wait = ["wait", "--for=condition=Established", "customresourcedefinitions", "--all"]
        run_kubectl(machine, path, [*wait, "--timeout=60s"], step, timeout=90.0)
        machine.sleep(PROGRESS_SECONDS)
    with cluster_lock(machine, wanted["cluster"]):
        applied = {key: wanted[key] for key in ("repository", "path", "commit")}
        write_record(machine, wanted["cluster"], argocd=applied)
    return {"commit": commit, "objects": len(ran.text.split())}


def _apply_remedy(complaint: str, wanted: Mapping[str, Any]) -> str:
    missing = re.search(r'namespaces "([^"]+)" not found', complaint)
    if missing:
        return (
            f"declare namespace {missing.group(1)} under homelab:namespaces, or in the repository"
        )
    if "git" in complaint or "accumulating" in complaint:
        return (
            f"check that {wanted['path']} at {wanted['commit']} holds a kustomization and that "
            "root on this host may read the repository"
        )
    return "mend the manifest in the repository, or the cluster, and run up again"
