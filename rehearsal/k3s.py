"""A make-believe k3s: what the service of a make-believe machine runs, and what `k3s` answers.

World, beside that of the machines:
  k3s/<cluster>.json   {"name", "ca", "certificate", "key" (base64), "token", "datastore",
                       "members": {node: {"machine", "address", "role", "version", "running",
                       "names"}}}; remove it, and the cluster is gone. Its objects are in the
                       kubernetes stand-in's world
World of a machine:
  k3s-broken.json      versions whose k3s ends as soon as it starts, or the datastore (sqlite, etcd)
                       with which it does
  k3s.json             {"cluster", "node"}: what runs or ran here
  k3s-holds.json       from when on k3s keeps this server's Node until it is out of etcd, by its
                       finalizer (seconds of the epoch); from the start without it
What k3s keeps on the host is below files/var/lib/rancher/k3s, as its datastore is: a state.db or an
etcd, each the token that it is sealed with and the cluster's name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from hostctl.k3s_node import (
    K3S_BINARY,
    K3S_CONFIG,
    K3S_DATA,
    K3S_DATABASE,
    K3S_KUBECONFIG,
    K3S_SERVER_TOKEN,
    k3s_password,
    parse_k3s_config,
)
from hostctl.machine import Ran
from rehearsal.core import World
from rehearsal.init import Usage

if TYPE_CHECKING:
    from rehearsal.apiserver import ApiServer

Object = dict[str, Any]
_SEALED = "made-up datastore: "
_MEMBER_FINALIZER = "wrangler.cattle.io/managed-etcd-controller"


class K3s:
    """The k3s of one make-believe machine."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.world = World(machine.above)

    # The cluster

    def cluster(self) -> Object | None:
        """The cluster that this machine's k3s is of."""
        here = self.machine.setting("k3s.json", None)
        return self.world.get(f"k3s/{here['cluster']}") if here else None

    def clusters(self) -> list[Object]:
        return [cluster for _, cluster in self.world.list("k3s")]

    def answers(self, cluster: Object) -> bool:
        """Whether the cluster's API can be used: a majority of its servers with etcd, the only one
        with SQLite."""
        servers = [one for one in cluster["members"].values() if one["role"] == "server"]
        running = [one for one in servers if one["running"]]
        return bool(running) and len(running) > len(servers) / 2

    def at(self, host: str, port: int) -> Object | None:
        """The cluster whose API answers at an address: of a running server, or a declared one that
        stands for its servers."""
        for cluster in self.clusters():
            servers = [one for one in cluster["members"].values() if one["role"] == "server"]
            running = [one for one in servers if one["running"]]
            reached = any(host in (one["address"], *one["names"]) for one in running)
            if port == 6443 and reached:
                return cluster
        return None

    def own(self) -> Object | None:
        """What this machine's server would answer at 127.0.0.1."""
        cluster = self.cluster()
        here = self.machine.setting("k3s.json", {})
        member = (cluster or {}).get("members", {}).get(here.get("node"))
        return cluster if member and member["running"] and member["role"] == "server" else None

    def api(self, cluster: Object) -> ApiServer:
        # Slow to load, and most of what a machine is asked does not reach a cluster.
        from rehearsal.apiserver import ApiServer
        from rehearsal.providers.kubernetes import cluster_id

        return ApiServer(World(self.machine.above / "kubernetes"), cluster_id(cluster["ca"]))

    # The service

    def start(self, unit: str, text: str) -> Object:
        """What systemd then says of the unit."""
        failed = {"ActiveState": "activating", "SubState": "auto-restart", "Result": "exit-code"}
        role = "agent" if "k3s agent" in text else "server"
        try:
            self._start(role, text)
        except _Ends as ends:
            self.machine.set("journal.json", {unit: str(ends)})
            return {**failed, "NRestarts": "20"}
        return {"ActiveState": "active", "SubState": "running", "Result": "success"}

    def stop(self) -> None:
        cluster = self.cluster()
        if cluster:
            node = self.machine.setting("k3s.json", {})["node"]
            if node in cluster["members"]:
                cluster["members"][node]["running"] = False
                self._put(cluster)
                self._say_node(cluster, node, ready=False)

    def _start(self, role: str, text: str) -> None:
        config = self._config()
        version = self.version(K3S_BINARY)
        if version is None or version in self.machine.setting("k3s-broken.json", []):
            raise _Ends(f"k3s {version} does not run here")
        token = self._text(config.get("token-file", ""))
        name = _cluster_name(text)
        if role == "agent":
            cluster = self._joined(config, token)
        else:
            cluster = self._serve(config, token, name)
            kind, _ = self._held() or ("", "")
            if kind in self.machine.setting("k3s-broken.json", []):
                raise _Ends(f"failed to start {kind}: context deadline exceeded")
        node = config["node-name"]
        address = str(config.get("node-ip") or self._address()).split(",")[0]
        before = cluster["members"].get(node)
        if before and before["machine"] != str(self.machine.root.name):
            raise _Ends(f"Node password rejected, duplicate hostname {node}")
        cluster["members"][node] = {
            "machine": self.machine.root.name,
            "address": address,
            "role": role,
            "version": version,
            "running": True,
            "names": _list(config.get("tls-san")),
        }
        self._put(cluster)
        self.machine.set("k3s.json", {"cluster": cluster["name"], "node": node})
        if role == "server":
            self._write_server(cluster)
        else:
            path = f"{K3S_DATA}/agent/kubelet.kubeconfig"
            self.machine.make_directory(f"{K3S_DATA}/agent", 0o700)
            self.machine.write_atomic(path, b"made up\n", 0o600)
        self._say_node(cluster, node, ready=True)

    def _serve(self, config: Object, token: str, name: str) -> Object:
        held = self._held()
        if held is None and "server" in config:
            cluster = self._joined(config, token)
            if cluster["datastore"] != "etcd":
                raise _Ends("cluster has no etcd to join")
            self._keep("etcd", cluster, token)
            return cluster
        if held is not None:
            kind, content = held
            sealed, of = content.split(" ")[:2]
            if sealed != _digest(token):
                raise _Ends("bootstrap data already found and encrypted with different token")
            cluster = self.world.get(f"k3s/{of}")
            if cluster is None:
                raise _Ends(f"made-up cluster {of} is gone")
            if kind == "sqlite" and config.get("cluster-init"):
                path = f"{K3S_DATABASE}/state.db"
                self._keep("etcd", cluster, token)
                self.machine.rename(path, f"{path}.migrated")
                cluster["datastore"] = "etcd"
            return cluster
        if not token:
            raise _Ends("--token is required")
        seed = self.machine.nonce()
        made = {key: _pem(f"{key} of {name} {seed}") for key in ("ca", "key")}
        kind = "etcd" if config.get("cluster-init") else "sqlite"
        cluster = {
            **made,
            "certificate": self.machine.certificate(f"{name} {seed}"),
            "name": name,
            "token": k3s_password(token),
            "datastore": kind,
            "members": {},
        }
        self._put(cluster)
        self._keep(kind, cluster, token)
        return cluster

    def _joined(self, config: Object, token: str) -> Object:
        where = urlsplit(config["server"])
        cluster = self.at(where.hostname or "", where.port or 6443)
        if cluster is None or not self.answers(cluster):
            raise _Ends(f"failed to get CA certs: {config['server']}: connection refused")
        if k3s_password(token) != cluster["token"]:
            raise _Ends("not authorized: token is not valid")
        return cluster

    def _held(self) -> tuple[str, str] | None:
        etcd = f"{K3S_DATABASE}/etcd/member/db"
        for kind, path in (("etcd", etcd), ("sqlite", f"{K3S_DATABASE}/state.db")):
            if self.machine.exists(path):
                return kind, self.machine.read(path).decode().removeprefix(_SEALED)
        return None

    def _keep(self, kind: str, cluster: Object, token: str) -> None:
        name = "etcd/member/db" if kind == "etcd" else "state.db"
        path = f"{K3S_DATABASE}/{name}"
        self.machine.make_directory(path.rpartition("/")[0], 0o700)
        content = f"{_SEALED}{_digest(token)} {cluster['name']} "
        self.machine.write_atomic(path, content.encode(), 0o600)

    def _write_server(self, cluster: Object) -> None:
        write = self.machine.write_atomic
        for directory in (f"{K3S_DATA}/server/tls", "/etc/rancher/k3s"):
            self.machine.make_directory(directory, 0o700)
        ca = base64.b64decode(cluster["ca"])
        full = f"K10{hashlib.sha256(ca).hexdigest()}::server:{cluster['token']}\n"
        write(K3S_SERVER_TOKEN, full.encode(), 0o600)
        write(f"{K3S_DATA}/server/tls/server-ca.crt", ca, 0o644)
        serving = base64.b64decode(cluster["certificate"])
        write(f"{K3S_DATA}/server/tls/serving-kube-apiserver.crt", serving, 0o644)
        write(K3S_KUBECONFIG, kubeconfig(cluster).encode(), 0o600)

    def _say_node(self, cluster: Object, node: str, *, ready: bool) -> None:
        """The Node object, as the kubelet, and the node controller where it is silent, keep it."""
        member = cluster["members"][node]
        roles = {}
        if member["role"] == "server":
            names = ["control-plane", "master", *(["etcd"] * (cluster["datastore"] == "etcd"))]
            roles = {f"node-role.kubernetes.io/{one}": "true" for one in names}
        holds = "node-role.kubernetes.io/etcd" in roles and self._holds()
        obj = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": node,
                "labels": {"kubernetes.io/hostname": node, **roles},
                "finalizers": [_MEMBER_FINALIZER] if holds else [],
            },
            "status": {
                "addresses": [{"type": "InternalIP", "address": member["address"]}],
                "conditions": [{"type": "Ready", "status": "True" if ready else "Unknown"}],
                "nodeInfo": {"kubeletVersion": member["version"]},
            },
        }
        api = self.api(cluster)
        key = f"{api.cluster}/_cluster/Node/{node}"
        live = api.world.get(key)
        if live is None:
            api.create(obj, "k3s")
        else:
            live["metadata"] |= obj["metadata"]
            api.world.put(key, {**live, "status": obj["status"]})

    def _holds(self) -> bool:
        return self.machine.now() >= self.machine.setting("k3s-holds.json", 0.0)

    # The program

    def run(self, binary: str, words: list[str], input: bytes, env: Mapping[str, str]) -> Ran:
        if not self.machine.exists(binary):
            raise FileNotFoundError(2, "No such file or directory", binary)
        match words:
            case ["--version"]:
                return _done(f"k3s version {self.version(binary)} (made up)\n")
            case ["kubectl", kubeconfig, *rest] if kubeconfig.startswith("--kubeconfig="):
                asked = [word for word in rest if word != "--request-timeout=30s"]
                return self._kubectl(kubeconfig.partition("=")[2], asked, input)
            case ["etcd-snapshot", what, *rest]:
                return self._snapshot(what, rest, env)
            case ["server", "--cluster-reset", *rest]:
                return self._reset(rest, env)
        raise Usage(f"k3s {' '.join(words[:2])}")

    def version(self, binary: str) -> str | None:
        """What the binary was downloaded as."""
        if not self.machine.exists(binary):
            return None
        found = re.search(rb"/download/([^/]+)/", self.machine.read(binary))
        return unquote(found.group(1).decode()) if found else None

    def _kubectl(self, kubeconfig: str, words: list[str], input: bytes) -> Ran:
        cluster = self.cluster()
        if not self.machine.exists(kubeconfig):
            return _failed(f"error: stat {kubeconfig}: no such file or directory")
        agent = kubeconfig != K3S_KUBECONFIG
        if cluster is None or not self.answers(cluster) or (self.own() is None and not agent):
            return _failed("The connection to the server 127.0.0.1:6443 was refused - did you spec")
        return self.kubectl(cluster, words, input)

    def kubectl(self, cluster: Object, words: list[str], input: bytes) -> Ran:
        own = self.machine.setting("k3s.json", {}).get("node")
        if own in cluster["members"] and self.machine.setting("k3s-holds.json", 0.0):
            self._say_node(cluster, own, ready=True)
        match words:
            case ["exec", *rest]:
                return self.machine.in_pod(rest, input)
            case ["get", "--raw=/version"]:
                servers = [one for one in cluster["members"].values() if one["role"] == "server"]
                return _done(json.dumps({"gitVersion": max(one["version"] for one in servers)}))
            case ["drain", node, "--ignore-daemonsets", "--delete-emptydir-data", _]:
                return self._cordon(cluster, node, True)
            case ["uncordon", node]:
                return self._cordon(cluster, node, False)
            case ["delete", "node", node] | ["delete", "node", node, "--wait=false"]:
                api = self.api(cluster)
                live = api.world.get(f"{api.cluster}/_cluster/Node/{node}")
                if live is None:
                    return _failed(f'Error from server (NotFound): nodes "{node}" not found')
                api.delete(live)
                # Without its finalizer nobody takes a server out of etcd.
                held = live["metadata"].get("finalizers")
                if held or "node-role.kubernetes.io/etcd" not in live["metadata"]["labels"]:
                    cluster["members"].pop(node, None)
                    self._put(cluster)
                return _done(f'node "{node}" deleted\n')
        return self.machine.kubectl_of(cluster["ca"], words, input)

    def _cordon(self, cluster: Object, node: str, cordoned: bool) -> Ran:
        api = self.api(cluster)
        key = f"{api.cluster}/_cluster/Node/{node}"
        live = api.world.get(key)
        if live is None:
            return _failed(f'Error from server (NotFound): nodes "{node}" not found')
        if cordoned and node in self.machine.setting("undrainable.json", []):
            return _failed("error: unable to drain node: global timeout reached: 300s timed out")
        spec = {name: one for name, one in live.get("spec", {}).items() if name != "unschedulable"}
        api.world.put(key, {**live, "spec": spec | ({"unschedulable": True} if cordoned else {})})
        return _done(f"node/{node} {'drained' if cordoned else 'uncordoned'}\n")

    def _snapshot(self, what: str, words: list[str], env: Mapping[str, str]) -> Ran:
        options = _options(words)
        cluster = self.own()
        held = self._held()
        if cluster is None or held is None or held[0] != "etcd":
            return _failed('level=fatal msg="etcd datastore disabled"')
        directory = options.get("etcd-snapshot-dir", f"{K3S_DATABASE}/snapshots")
        if "etcd-s3" in options:
            if not env.get("AWS_SECRET_ACCESS_KEY"):
                return _failed('level=fatal msg="s3 credentials"')
            directory = f"/s3/{options['etcd-s3-bucket']}"
        names = self.machine.names(directory)
        match what:
            case "save":
                now = int(self.machine.now())
                here = self.machine.setting("k3s.json", {})["node"]
                name = f"{options['name']}-{here}-{now}"
                api = self.api(cluster)
                kept = dict(api.world.list(api.cluster))
                held_now = {"sealed": held[1], "objects": kept, "token": cluster["token"]}
                self.machine.make_directory(directory, 0o700)
                content = json.dumps(held_now).encode()
                self.machine.write_atomic(f"{directory}/{name}", content, 0o600)
                self.machine.sleep(1)
                return _done(f"Snapshot {name} saved.\n")
            case "ls":
                rows = ["Name Location Size Created"]
                for name in names:
                    created = datetime.fromtimestamp(int(name.rpartition("-")[2]), timezone.utc)
                    size = self.machine.file_bytes(f"{directory}/{name}")
                    at = created.strftime("%Y-%m-%dT%H:%M:%SZ")
                    rows.append(f"{name} file://{directory}/{name} {size} {at}")
                return _done("\n".join(rows) + "\n")
            case "prune":
                mine = [one for one in names if one.startswith(options["name"] + "-")]
                for name in mine[: -int(options["snapshot-retention"])]:
                    self.machine.remove(f"{directory}/{name}")
                return _done()
        raise Usage(f"k3s etcd-snapshot {what}")

    def _reset(self, words: list[str], env: Mapping[str, str]) -> Ran:
        options = _options(words)
        config = parse_k3s_config(self.machine.read(options["config"]).decode())
        path = options["cluster-reset-restore-path"]
        if "etcd-s3" in options:
            path = f"/s3/{options['etcd-s3-bucket']}/{path}"
        if "server" in config or not self.machine.exists(path):
            return _failed(f'level=fatal msg="etcd: snapshot path does not exist: {path}"')
        kept = json.loads(self.machine.read(path))
        token = self._text(config["token-file"])
        sealed, name = kept["sealed"].split(" ")[:2]
        if sealed != _digest(token):
            return _failed('level=fatal msg="failed to decrypt: token is not of the snapshot"')
        cluster = self.world.get(f"k3s/{name}")
        assert cluster is not None
        api = self.api(cluster)
        for key, _ in list(api.world.list(api.cluster)):
            api.world.delete(key)
        for key, obj in kept["objects"].items():
            api.world.put(key, obj)
        here = self.machine.setting("k3s.json", {})["node"]
        members = cluster["members"]
        cluster["members"] = {
            node: one for node, one in members.items() if one["role"] == "agent" or node == here
        }
        cluster |= {"token": kept["token"], "datastore": "etcd"}
        self._put(cluster)
        self._keep("etcd", cluster, token)
        return Ran(0, b"", b'msg="Managed etcd cluster membership has been reset"\n')

    def rotate(self, login: tuple[str, str], body: bytes) -> tuple[int, str]:
        """PUT /v1-k3s/token."""
        cluster = self.own()
        if cluster is None:
            raise ConnectionRefusedError(111, "Connection refused")
        if login != ("server", cluster["token"]):
            return 401, "Unauthorized"
        new = json.loads(body)["newToken"]
        cluster["token"] = new
        self._put(cluster)
        # The datastore is sealed anew on every server, by etcd itself.
        for member in cluster["members"].values():
            if member["role"] == "server":
                one = K3s(self.machine.beside(member["machine"]))
                one._keep(cluster["datastore"], cluster, new)
        self._write_server(cluster)
        return 200, ""

    # Files

    def _config(self) -> Object:
        return parse_k3s_config(self._text(K3S_CONFIG))

    def _text(self, path: str) -> str:
        try:
            return self.machine.read(path).decode().strip()
        except FileNotFoundError:
            raise _Ends(f"open {path}: no such file or directory") from None

    def _address(self) -> str:
        return self.machine.root.name if self.machine.root.name != "machine" else "192.0.2.10"

    def _put(self, cluster: Object) -> None:
        self.world.put(f"k3s/{cluster['name']}", cluster)


class _Ends(Exception):
    """k3s ends with this last line."""


def _cluster_name(unit: str) -> str:
    found = re.search(r"cluster=(\S+)", unit)
    return found.group(1) if found else "default"


def _list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


def _options(words: list[str]) -> dict[str, str]:
    pairs = (word.removeprefix("--").partition("=") for word in words)
    return {key: value for key, _, value in pairs}


def _digest(token: str) -> str:
    return hashlib.sha256(k3s_password(token).encode()).hexdigest()


def _done(text: str = "") -> Ran:
    return Ran(0, text.encode(), b"")


def _failed(text: str) -> Ran:
    return Ran(1, b"", text.encode() + b"\n")


def _pem(what: str) -> str:
    body = base64.b64encode(hashlib.sha256(f"rehearsal {what}".encode()).digest()).decode()
    kind = "EC PRIVATE KEY" if what.startswith("key") else "CERTIFICATE"
    text = f"-----BEGIN {kind}-----\n{body}\n-----END {kind}-----\n"
    return base64.b64encode(text.encode()).decode()


def kubeconfig(cluster: Object) -> str:
    """/etc/rancher/k3s/k3s.yaml, or /output/kubeconfig.yaml in a node of k3d, as k3s writes it."""
    return f"""apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: {cluster["ca"]}
    server: https://127.0.0.1:6443
  name: default
contexts:
- context:
    cluster: default
    user: default
  name: default
current-context: default
kind: Config
preferences: {{}}
users:
- name: default
  user:
    client-certificate-data: {cluster["certificate"]}
    client-key-data: {cluster["key"]}
"""
