"""hostctl finds what exists: things in Docker by their names, Secrets that somebody made."""

from pathlib import Path

import pytest

from tests.unit.test_hostctl import Host
from tests.unit.test_hostctl_existing import FILE, Metal


def test_ids_in_docker_are_found_by_name(tmp_path: Path) -> None:
    host = Host(tmp_path)
    found = host("docker find", {"networks": ["k3d-factory", "other"], "containers": ["nobody"]})
    assert found["networks"] == {"k3d-factory": "n1", "other": None}
    assert found["containers"] == {"nobody": None}


def test_a_docker_that_does_not_answer_is_no_absence(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.machine.root.mkdir(parents=True, exist_ok=True)
    (host.machine.root / "docker-down").touch()
    assert host("docker find", {"networks": ["k3d-factory"]}, 4)["code"] == "cannot-tell"


@pytest.mark.parametrize(
    ("kind", "metadata", "kept"),
    [
        ("Opaque", {}, True),
        ("kubernetes.io/service-account-token", {}, False),
        ("Opaque", {"annotations": {"argocd.argoproj.io/tracking-id": "app:/Secret:a/b"}}, False),
        (
            "Opaque",
            {
                "ownerReferences": [
                    {"apiVersion": "v1", "kind": "ConfigMap", "name": "a", "uid": "1"}
                ]
            },
            False,
        ),
    ],
)
def test_secrets_are_listed_by_name_and_told_whether_anybody_makes_them_again(
    tmp_path: Path, kind: str, metadata: dict, kept: bool
) -> None:
    metal = Metal(tmp_path)
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"namespace": "default", "name": "one", **metadata},
        "type": kind,
        "data": {"password": "Y2FuYXJ5"},
    }
    metal.objects.put(f"{metal.inside.cluster}/default/Secret/one", secret)
    for kubeconfig in (metal.kubeconfig, FILE):
        found = metal("secret list", {"cluster": "metal", "kubeconfig": kubeconfig})
        assert found["secrets"] == [{"namespace": "default", "name": "one", "kept": kept}]
        assert "Y2FuYXJ5" not in str(found)
