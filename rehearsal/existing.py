"""A make-believe cluster that is there already: what a stack of `kind: existing` finds.

It is made of the stack's own settings before the first run: an API server at the first node's
address, the kubeconfig where the settings expect it, and a Node for each declared one. Edit the
Nodes in the world of the kubernetes stand-in to lose one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rehearsal.apiserver import ApiServer
from rehearsal.core import World
from rehearsal.machine import RehearsalMachine
from rehearsal.providers.kubernetes import cluster_id

VERSION = "v1.31.5"
"""What the kubelets say."""


def made_up(cluster: Mapping[str, Any]) -> dict[str, str]:
    """Name, server and credentials (base64), always the same for a cluster's name."""
    nodes = list((cluster.get("nodes") or {}).values())
    address = nodes[0]["address"] if nodes else "192.0.2.10"
    kubeconfig = cluster.get("kubeconfig") or {}
    return {
        "name": cluster["name"],
        "state": "running",
        "server": kubeconfig.get("server") or f"https://{address}:6443",
        **{key: _pem(f"{key} of {cluster['name']}") for key in ("ca", "certificate", "key")},
    }


def kubeconfig(cluster: Mapping[str, Any]) -> str:
    """As kubeadm writes it, beside a context of another cluster, which is current."""
    made = made_up(cluster)
    context = (cluster.get("kubeconfig") or {}).get("context") or "kubernetes-admin@kubernetes"
    other = {"certificate-authority-data": _pem("another CA"), "server": "https://192.0.2.1:6443"}
    own = {"certificate-authority-data": made["ca"], "server": made["server"]}
    login = {"client-certificate-data": made["certificate"], "client-key-data": made["key"]}
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "elsewhere", "cluster": other},
                {"name": "kubernetes", "cluster": own},
            ],
            "users": [{"name": "kubernetes-admin", "user": login}],
            "contexts": [
                {
                    "name": "elsewhere",
                    "context": {"cluster": "elsewhere", "user": "kubernetes-admin"},
                },
                {
                    "name": context,
                    "context": {"cluster": "kubernetes", "user": "kubernetes-admin"},
                },
            ],
            "current-context": "elsewhere",
        }
    )


def put(world: Path, cluster: Mapping[str, Any]) -> None:
    """Makes the cluster in the world, unless it is there."""
    machine = RehearsalMachine(world / "machine")
    made = made_up(cluster)
    if machine.world.get(f"existing/{made['name']}") is not None:
        return
    machine.world.put(f"existing/{made['name']}", made)
    file = (cluster.get("kubeconfig") or {}).get("file")
    if file:
        machine.make_directory(file.rpartition("/")[0] or "/", 0o755)
        machine.write_atomic(file, kubeconfig(cluster).encode(), 0o600)
    api = ApiServer(World(world / "kubernetes"), cluster_id(made["ca"]))
    for name, node in (cluster.get("nodes") or {}).items():
        api.create(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name},
                "status": {
                    "addresses": [{"type": "InternalIP", "address": node["address"]}],
                    "conditions": [{"type": "Ready", "status": "True"}],
                    "nodeInfo": {"kubeletVersion": VERSION},
                },
            },
            "kubelet",
        )


def _pem(what: str) -> str:
    body = base64.b64encode(hashlib.sha256(f"rehearsal {what}".encode()).digest()).decode()
    kind = "EC PRIVATE KEY" if what.startswith("key") else "CERTIFICATE"
    text = f"-----BEGIN {kind}-----\n{body}\n-----END {kind}-----\n"
    return base64.b64encode(text.encode()).decode()
