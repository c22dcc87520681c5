"""Copies of backups by a real restic, in a directory and on a real S3 server, restored where the
original never was. Keycloak's claim and k3s' datastore are those of a real k3d cluster.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.host import Host

pytestmark = pytest.mark.cluster

STORAGE = "/mnt/img_pool/k3d/storage"
VOLUME = f"{STORAGE}/pvc-1_factory_keycloak-data"
KEYS = "/var/lib/homelab/backups/factory"
ITEMS = [
    {
        "name": "keycloak",
        "kind": "volume",
        "namespace": "factory",
        "claim": "keycloak-data",
        "scale_down": "deployment/keycloak",
    },
    {"name": "state", "kind": "directory", "path": "/var/lib/pulumi"},
    {"name": "cluster", "kind": "datastore"},
]
NAS = {"name": "nas", "kind": "directory", "repository": "/mnt/nas/restic", "keep_daily": 14}
OFFSITE = {
    "name": "offsite",
    "kind": "s3",
    "repository": "s3:http://127.0.0.1:9000/backups/factory",
    "keep_last": 1,
}
SPEC: dict[str, Any] = {"cluster": "factory", "items": ITEMS, "targets": [NAS, OFFSITE]}
SECRETS = ("made-up-password", "made-up-secret-key")
OBJECTS: list[dict[str, Any]] = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "factory"}},
    {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "pvc-1"},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "local-path",
            "claimRef": {"namespace": "factory", "name": "keycloak-data"},
            "hostPath": {"path": VOLUME.replace(STORAGE, "/var/lib/rancher/k3s/storage")},
        },
    },
    {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"namespace": "factory", "name": "keycloak-data"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "local-path",
            "volumeName": "pvc-1",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    },
    {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"namespace": "factory", "name": "keycloak"},
        "spec": {
            "selector": {"matchLabels": {"app": "keycloak"}},
            "template": {
                "metadata": {"labels": {"app": "keycloak"}},
                "spec": {
                    "containers": [{"name": "keycloak", "image": "keycloak:26.0"}],
                    "volumes": [
                        {"name": "data", "persistentVolumeClaim": {"claimName": "keycloak-data"}}
                    ],
                },
            },
        },
    },
]


def sh(host: Host, script: str) -> str:
    return host.engine.run(["sh", "-ec", script]).stdout


def write_keys(host: Host) -> None:
    """As the stack does."""
    keys = f"[default]\naws_access_key_id = made-up-id\naws_secret_access_key = {SECRETS[1]}\n"
    for name, content in (
        ("nas.password", SECRETS[0]),
        ("offsite.password", SECRETS[0]),
        ("offsite.credentials", keys),
    ):
        written = {"path": f"{KEYS}/{name}", "content": content, "mode": "0600"}
        host.done("files", "write", spec={**written, "owner": "root", "group": "root"})


@pytest.fixture
def keycloak(host: Host, spec: dict[str, Any], network: str) -> Iterator[Host]:
    """A cluster whose Keycloak has written, the keys of the targets, and an S3 server."""
    bucket = host.engine.root / "s3"
    shutil.rmtree(bucket, ignore_errors=True)  # of the test before
    host.done("k3d", "ensure", spec={**spec, "generation": 1})
    listed = {"apiVersion": "v1", "kind": "List", "items": OBJECTS}
    host.kubectl("apply", "--filename=-", input=json.dumps(listed))
    host.kubectl("wait", "--for=jsonpath={.status.readyReplicas}=1", "--timeout=60s",
                 "--namespace=factory", "deployment/keycloak")  # fmt: skip
    sh(host, f"mkdir -p {VOLUME}/h2 /var/lib/pulumi /mnt/nas")
    sh(host, f"echo the realm > {VOLUME}/h2/keycloakdb.mv.db; chown -R 1000:0 {VOLUME}/h2")
    sh(host, "echo {} > /var/lib/pulumi/p510.json")
    write_keys(host)
    (bucket / "backups").mkdir(parents=True)
    server = ["versitygw", "--quiet", "--port", "127.0.0.1:9000", "posix", str(bucket)]
    keys = {"ROOT_ACCESS_KEY": "made-up-id", "ROOT_SECRET_KEY": SECRETS[1]}
    quiet = subprocess.DEVNULL
    with host.engine.popen(server, env=keys, stdout=quiet, stderr=quiet) as s3:
        try:
            yield host
        finally:
            s3.kill()


def replicas(host: Host) -> str:
    jsonpath = "--output=jsonpath={.spec.replicas}"
    return host.kubectl("get", "deployment/keycloak", "--namespace=factory", jsonpath)


def restore(host: Host, item: str, target: str | None, **more: Any) -> dict[str, Any]:
    return host("backup", "restore", spec={**SPEC, "item": item, "target": target, **more})


def test_copies_are_proved_by_restores_and_come_back_where_the_original_never_was(
    keycloak: Host, spec: dict[str, Any]
) -> None:
    host = keycloak
    taken = host.done("backup", "run", spec={**SPEC, "keep": 3})["items"]
    assert set(taken) == {"keycloak", "state", "cluster"}
    for secret in SECRETS:
        assert secret not in host.said
    # Encrypted: what the volume holds is in no file of a repository.
    for repository in ("/mnt/nas/restic", f"{host.engine.root}/s3/backups"):
        found = host.engine.run(["grep", "-r", "the realm", repository], check=False)
        assert found.returncode == 1, found.stdout

    verified = host.done("backup", "verify", spec=SPEC)["verified"]
    assert {at: set(items) for at, items in verified.items()} == {
        "nas": {"keycloak", "state", "cluster"},
        "offsite": {"keycloak", "state", "cluster"},
    }
    assert all(
        seen["recovery_seconds"] > 0 for items in verified.values() for seen in items.values()
    )
    assert sh(host, "ls -A /var/lib/homelab/restored") == ""

    # What was written after the backup is not overwritten unless it is told.
    sh(host, f"echo newer > {VOLUME}/h2/keycloakdb.mv.db; touch -d '+1 min' {VOLUME}/h2/*")
    refused = restore(host, "keycloak", "offsite")["error"]
    assert refused["code"] == "refused"
    assert "--confirm factory" in refused["remedy"]
    assert sh(host, f"cat {VOLUME}/h2/keycloakdb.mv.db") == "newer\n"
    assert replicas(host) == "1"
    done = restore(host, "keycloak", "offsite", confirm="factory")
    assert done["ok"], done
    assert sh(host, f"cat {VOLUME}/h2/keycloakdb.mv.db") == "the realm\n"
    assert sh(host, f"stat -c %u:%g {VOLUME}/h2") == "1000:0\n"
    assert sh(host, f"cat {VOLUME}.before-*/h2/keycloakdb.mv.db") == "newer\n"
    assert replicas(host) == "1"

    # A machine that never saw the original: neither records, nor copies, nor the cluster's data.
    host.kubectl("create", "configmap", "later", "--namespace=factory")
    host.done("k3d", "stop", spec={"name": "factory"})
    # (What the stopped node mounts of hostctl's directory stays.)
    known = ["backups", "restored", "restic-cache", "locks", "clusters/factory.json"]
    gone = " ".join(f"/var/lib/homelab/{name}" for name in known)
    sh(host, f"rm -rf {gone} {STORAGE}-backups {VOLUME}* /mnt/nas")
    write_keys(host)
    for item in ("keycloak", "cluster"):
        done = restore(host, item, "offsite", into=f"/mnt/new/{item}")
        assert done["ok"], done
    assert sh(host, "cat /mnt/new/keycloak/h2/keycloakdb.mv.db") == "the realm\n"

    # The datastore opens, and has what the cluster had then and nothing of later.
    server = f"{spec['datastore_dir']}/server-0"
    sh(host, f"mv {server} {server}.before; mv /mnt/new/cluster {server}")
    host.done("k3d", "ensure", spec={**spec, "generation": 1})
    assert replicas(host) == "1"
    assert "later" not in host.kubectl("get", "configmaps", "--namespace=factory")


def test_what_is_damaged_gone_or_not_mounted_is_an_error_and_no_backup(keycloak: Host) -> None:
    host = keycloak
    only = {**SPEC, "items": ITEMS[1:2], "targets": [NAS]}
    host.done("backup", "run", spec={**only, "keep": 3})

    nfs = {**only, "targets": [{**NAS, "kind": "nfs"}], "keep": 3}
    assert "and not on NFS" in host("backup", "run", spec=nfs)["error"]["cause"]

    sh(host, "mv /mnt/nas /mnt/unplugged; mkdir /mnt/nas")
    gone = host("backup", "run", spec={**only, "keep": 3})["error"]
    assert "/mnt/nas/restic has no repository; backups went to" in gone["cause"]
    assert sh(host, "ls -A /mnt/nas") == ""
    sh(host, "rmdir /mnt/nas; mv /mnt/unplugged /mnt/nas")

    # Another password, as docs/rotation.md says.
    sh(host, "echo another > /root/new-password")
    keys = {"RESTIC_REPOSITORY": NAS["repository"], "RESTIC_PASSWORD_FILE": f"{KEYS}/nas.password"}
    change = ["restic", "key", "passwd", "--new-password-file", "/root/new-password"]
    host.engine.run(change, env={key: str(value) for key, value in keys.items()})
    closed = host("backup", "run", spec={**only, "keep": 3})["error"]
    assert "wrong password" in closed["cause"]
    sh(host, f"cp /root/new-password {KEYS}/nas.password")
    host.done("backup", "run", spec={**only, "keep": 3})

    sh(host, "for pack in $(find /mnt/nas/restic/data -type f); do : > $pack; done")
    broken = host("backup", "verify", spec=only)["error"]
    assert broken["code"] == "failed"
    assert sh(host, "ls -A /var/lib/homelab/restored 2>/dev/null || true") == ""


def test_a_restore_that_is_killed_is_ended_by_the_next(keycloak: Host) -> None:
    """Killed at the worst moment: the old directory is away and the new one not yet in place."""
    host = keycloak
    host.done("backup", "run", spec={**SPEC, "items": ITEMS[:1], "targets": [], "keep": 3})
    sh(host, f"mv {VOLUME} {VOLUME}.before-x; cp -a {VOLUME}.before-x {VOLUME}.restoring")
    record = "/var/lib/homelab/clusters/factory.json"
    content = json.loads(sh(host, f"cat {record}"))
    content["swapping"] = {"directory": VOLUME, "before": f"{VOLUME}.before-x"}
    host.engine.run(["tee", record], input=json.dumps(content))
    done = restore(host, "keycloak", None)
    assert done["ok"], done
    assert sh(host, f"cat {VOLUME}/h2/keycloakdb.mv.db") == "the realm\n"
    assert "swapping" not in {
        key for key, value in json.loads(sh(host, f"cat {record}")).items() if value
    }
