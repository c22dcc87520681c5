"""p510 as its incumbent left it: made by a NixOS module, a shell script and `cloudflared`."""

import json
from pathlib import Path
from typing import Any

from rehearsal.apiserver import ApiServer
from rehearsal.core import World
from rehearsal.kubectl import kustomization
from rehearsal.providers.kubernetes import cluster_id
from tests.engine.conftest import P510
from tests.unit.test_hostctl import cluster_of_the_incumbent

TUNNELS = {
    "factory": "01234567-89ab-4def-8123-456789abcdef",
    "p510": "fedcba98-7654-4321-8fed-cba987654321",
}
ROTATED = "cm90YXRlZCBieSB0aGUgY2x1c3Rlcg=="
UNIT = "/etc/systemd/system/cloudflared-tunnel-fedcba98.service"

_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


class Incumbent(P510):
    """p510 beside what is there already, declared as it is: the settings are the stack file's but
    for the network that Docker chose and the tunnels that are managed locally.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        with self.edited() as settings:
            settings["cluster"]["network"]["subnet"] = "172.20.0.0/16"
            for name, tunnel in settings["tunnels"].items():
                tunnel.update(
                    adopt={"id": TUNNELS[name], "configSrc": "local"},
                    management="local",
                    connector={"kind": "external"},
                )
                for route in tunnel["routes"]:
                    # It is in the connector's own file.
                    route.pop("origin", None)
        self._make_cluster()
        self._fill_cluster()
        self._make_tunnels()

    def _make_cluster(self) -> None:
        self.host.docker_world.put(
            "network/k3d-factory",
            {
                "id": "5" * 64,
                "name": "k3d-factory",
                "driver": "bridge",
                "ipamDriver": "default",
                "ipamConfigs": [{"subnet": "172.20.0.0/16", "gateway": "172.20.0.1"}],
                "labels": [{"label": "app", "value": "k3d"}],
                "options": {"com.docker.network.bridge.enable_ip_masquerade": "true"},
                "attachable": False,
                "ingress": False,
                "internal": False,
                "ipv6": False,
                "scope": "local",
            },
        )
        made = cluster_of_the_incumbent(self.host)
        self._api = ApiServer(World(self.world / "kubernetes"), cluster_id(made["ca"]))
        # cloudflared on the host, by services.cloudflared of NixOS.
        self.write_file(UNIT, "[Service]\nExecStart=cloudflared tunnel run\n")

    def _fill_cluster(self) -> None:
        for namespace in ("factory", "fides", "fides-reporter", "tailscale"):
            self.apply(_object("v1", "Namespace", namespace))
        files = self.decrypted_files()
        login = files.pop(self.settings["tailscale"]["authKey"]["file"]).decode()
        self.write_file(self.settings["tailscale"]["authKey"]["file"], login)
        key = {"stringData": {"TS_AUTHKEY": login.strip()}}
        self.apply({**_object("v1", "Secret", "auth-key", "tailscale"), **key})
        for path, content in files.items():
            self.write_file(path, content.decode())
            self.apply(json.loads(content))
        argocd = self.settings["argocd"]
        asked = ["git", "ls-remote", "--", argocd["repository"], "refs/heads/main"]
        answer = self.host.run(asked, env={"GIT_TERMINAL_PROMPT": "0"}).text
        commit = answer.split()[0]
        for obj in kustomization(argocd["repository"], argocd["path"], commit):
            self.apply(obj)
        for namespace in ("argocd", "factory"):
            self.apply({**_object("v1", "Secret", "tailscale-auth-key", namespace), **key})
        # What the cluster itself made of it since, and what nobody declared.
        rotated = self.live("factory", "Secret", "factory-cli-creds")
        rotated["data"] = dict.fromkeys(rotated["data"], ROTATED)
        self._put("factory/Secret/factory-cli-creds", rotated)
        by_hand = _object("v1", "Secret", "made-by-hand", "factory")
        self.apply({**by_hand, "stringData": {"key": "made by hand"}})
        argocds = _object("v1", "Secret", "argocd-secret", "argocd")
        argocds["metadata"]["annotations"] = {"argocd.argoproj.io/tracking-id": "argocd:/Secret:"}
        argocds["stringData"] = {"key": "made by ArgoCD"}
        self._api.create(argocds, "argocd-controller")
        for name, secret in (("cloudflared", "cloudflared-factory"), ("skillai", "skillai-db")):
            self._api.create(_deployment(name, secret), "argocd-controller")

    def apply(self, obj: dict[str, Any]) -> None:
        """`kubectl apply`, client-side."""
        metadata = {**obj["metadata"], "annotations": {_LAST_APPLIED: json.dumps(obj)}}
        self._api.create({**obj, "metadata": metadata}, "kubectl-client-side-apply")

    def live(self, namespace: str, kind: str, name: str) -> dict[str, Any]:
        return json.loads((self.objects / namespace / kind / f"{name}.json").read_text())

    def secrets(self) -> set[str]:
        """All values of Secrets in the cluster, as base64."""
        files = self.objects.glob("*/Secret/*.json")
        return {value for file in files for value in json.loads(file.read_text())["data"].values()}

    @property
    def objects(self) -> Path:
        return self.world / "kubernetes" / self._api.cluster

    def _put(self, key: str, obj: dict[str, Any]) -> None:
        self._api.world.put(f"{self._api.cluster}/{key}", obj)

    def _make_tunnels(self) -> None:
        cloudflare = World(self.world / "cloudflare")
        account = self.settings["cloudflare"]["accountId"]
        ((_, zone),) = self.settings["cloudflare"]["zones"].items()
        for name, tunnel in self.settings["tunnels"].items():
            id = TUNNELS[name]
            made = {
                "accountId": account,
                "accountTag": account,
                "configSrc": "local",
                "connections": [{"id": id, "coloName": "lhr01"}],
                "createdAt": "2026-06-07T10:00:00Z",
                "id": id,
                "metadata": "{}",
                "name": name,
                "remoteConfig": False,
                "status": "healthy",
                "tunType": "cfd_tunnel",
                "tunnelSecret": tunnel["secret"],
            }
            cloudflare.create(f"tunnel/{account}/{name}", made, id)
            for number, route in enumerate(tunnel["routes"]):
                # cloudflared tunnel route dns
                record = {
                    "id": f"{id[:8]}{number:024}",
                    "zoneId": zone,
                    "name": route["hostname"],
                    "type": "CNAME",
                    "content": f"{id}.cfargotunnel.com",
                    "proxied": True,
                    "proxiable": True,
                    "ttl": 1,
                    "meta": "{}",
                    "settings": {"flattenCname": False, "ipv4Only": False, "ipv6Only": False},
                    "tags": [],
                    "createdOn": "2026-06-07T10:00:00Z",
                    "modifiedOn": "2026-06-07T10:00:00Z",
                }
                cloudflare.create(f"record/{zone}/{route['hostname']}/CNAME", record, record["id"])


def _object(version: str, kind: str, name: str, namespace: str | None = None) -> dict[str, Any]:
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _deployment(name: str, secret: str) -> dict[str, Any]:
    """A workload of an ArgoCD application that reads a Secret."""
    deployment = _object("apps/v1", "Deployment", name, "factory")
    deployment["metadata"]["annotations"] = {
        "argocd.argoproj.io/tracking-id": f"factory:apps/Deployment:factory/{name}"
    }
    container = {
        "name": name,
        "image": f"registry.example.org/{name}:1",
        "envFrom": [{"secretRef": {"name": secret}}],
    }
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    deployment["spec"] = {"selector": {"matchLabels": labels}, "template": template}
    return deployment
