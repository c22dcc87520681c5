"""Secrets: values come whole from their sources or are refused by name; objects are mutable, seeds
are not; no value is ever shown.
"""

import base64
import json
from collections.abc import Sequence
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes
import pytest

from components import settings
from components.cluster import Cluster
from components.host import Connection, Host, HostError
from components.namespaces import Namespaces, NamespacesArgs
from components.secrets import Secrets, SecretsArgs, SecretValue, read_values

CANARY = "c4n4ry-v4lue"


def declared(namespace: str = "factory", name: str = "db", copy_of=None, **secret: Any):
    return settings.DeclaredSecret(
        namespace, name, settings.Secret.model_validate(secret, by_name=True), copy_of
    )


def manifest(namespace="factory", name="db", **rest: Any) -> bytes:
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"namespace": namespace, "name": name},
            **(rest or {"stringData": {"password": CANARY}}),
        }
    ).encode()


def present(content: bytes) -> dict[str, Any]:
    return {"state": "present", "content": base64.b64encode(content).decode(), "detail": ""}


@pytest.fixture
def read(run_program, monkeypatch):
    """Reads the values of declared Secrets from files as `hostctl files read` would return them."""

    def run(declarations, files=None, host=None) -> list[SecretValue]:
        asked: list[tuple[str, dict[str, Any]]] = []

        def answers(connection: Connection, questions):
            asked.extend((connection.name, spec) for _, spec in questions)
            absent = {"state": "absent", "content": None, "detail": "no such file"}
            return [
                {
                    "made_up": [],
                    "files": {
                        request["path"]: (files or {}).get(request["path"], absent)
                        for request in spec["files"]
                    },
                }
                for _, spec in questions
            ]

        monkeypatch.setattr(Connection, "answers", answers)
        where = host or settings.Host()
        values: list[SecretValue] = []
        run_program(lambda: values.extend(Connection(where).read(read_values(declarations, where))))
        run.asked = asked  # pyright: ignore[reportFunctionMemberAccess]
        return values

    return run


def decoded(value: SecretValue) -> dict[str, bytes]:
    return {key: base64.b64decode(text) for key, text in value.data.items()}


def test_config_files_and_manifests_give_their_values(read):
    values = read(
        [
            declared(name="config", data={"a": CANARY}),
            declared(name="file", files={"token": "/run/agenix/token"}),
            declared(name="whole", manifest="/run/agenix/whole"),
        ],
        {
            "/run/agenix/token": present(b"tskey-auth-1\n"),
            "/run/agenix/whole": present(
                manifest(name="whole", data={"bin": "AAH/"}, stringData={"text": "t"})
            ),
        },
    )
    assert [decoded(value) for value in values] == [
        {"a": CANARY.encode()},
        {"token": b"tskey-auth-1"},
        {"bin": b"\x00\x01\xff", "text": b"t"},
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (manifest(namespace="fides"), "metadata.namespace 'fides', declared is 'factory'"),
        (manifest(name="other"), "metadata.name 'other', declared is 'db'"),
        (manifest(type="kubernetes.io/tls", stringData={"x": "y"}), "type 'kubernetes.io/tls'"),
        (manifest().replace(b"Secret", b"ConfigMap"), "kind 'ConfigMap'"),
        (manifest() + b"\n---\n" + manifest(), "2 documents"),
        (manifest(data={"password": CANARY + "*"}), "data.password is not base64"),
        (manifest(stringData={"port": 5432}), "stringData.port is not a string"),
        (b"{unclosed: [" + CANARY.encode(), "not YAML"),
        (b"\xc3(" + CANARY.encode(), "not YAML"),
        (manifest(data={}), "neither data nor stringData"),
        (manifest(metadata=[CANARY]), "metadata.name None"),
    ],
)
def test_a_manifest_must_be_the_declared_secret(read, content, complaint):
    with pytest.raises(HostError) as refusal:
        read([declared(manifest="/run/agenix/db")], {"/run/agenix/db": present(content)})
    assert complaint in str(refusal.value)
    assert "factory/db" in str(refusal.value)
    assert CANARY not in str(refusal.value)


def test_all_missing_files_are_named_at_once_and_never_their_content(read):
    with pytest.raises(HostError) as refusal:
        read(
            [
                declared(name="one", manifest="/run/agenix/one"),
                declared(name="two", files={"k": "/run/agenix/two"}),
                declared(name="three", files={"k": "/run/agenix/three"}),
            ],
            {
                "/run/agenix/two": {
                    "state": "unreadable",
                    "content": None,
                    "detail": "permission denied",
                },
                "/run/agenix/three": present(CANARY.encode()),
            },
        )
    text = str(refusal.value)
    assert "factory/one: /run/agenix/one is absent" in text
    assert "factory/two: /run/agenix/two is unreadable: permission denied" in text
    assert "three" not in text
    assert CANARY not in text


def test_an_optional_secret_without_its_file_is_left_out_with_a_warning(read, caplog):
    assert read([declared(optional=True, manifest="/run/agenix/db")]) == []
    assert "factory/db is optional and left out: /run/agenix/db does not exist" in caplog.text


def test_an_optional_secret_with_a_wrong_file_is_refused(read):
    with pytest.raises(HostError, match="not YAML"):
        read(
            [declared(optional=True, manifest="/run/agenix/db")],
            {"/run/agenix/db": present(b"[")},
        )


def test_required_keys_of_a_type_are_checked_in_the_file(read):
    with pytest.raises(HostError, match=r"kubernetes.io/tls needs tls.key"):
        read(
            [declared(type="kubernetes.io/tls", manifest="/run/agenix/db")],
            {
                "/run/agenix/db": present(
                    manifest(type="kubernetes.io/tls", stringData={"tls.crt": "x"})
                )
            },
        )


def test_a_copy_takes_the_manifest_of_the_secret_that_it_repeats(read):
    (copy,) = read(
        [
            declared(
                "argocd",
                "tailscale-auth-key",
                copy_of=("tailscale", "auth-key"),
                manifest="/run/agenix/ts",
            )
        ],
        {"/run/agenix/ts": present(manifest("tailscale", "auth-key"))},
    )
    assert (copy.namespace, copy.name) == ("argocd", "tailscale-auth-key")


def test_each_file_is_read_on_the_machine_that_the_settings_name(read):
    host = settings.Host.model_validate(
        {"connection": "ssh", "address": "p510.lan", "user": "root"}, by_name=True
    )
    files = {f"/f/{n}": present(b"x") for n in ("host", "here")}
    read(
        [
            declared(name="a", files={"k": "/f/host"}),
            declared(name="b", files={"k": "/f/here"}, read_on="here"),
        ],
        files,
        host,
    )
    assert [
        (name, [request["path"] for request in spec["files"]]) for name, spec in read.asked
    ] == [
        ("host p510.lan", ["/f/host"]),
        ("this machine", ["/f/here"]),
    ]


def test_the_value_is_in_no_repr():
    value = SecretValue("factory", "db", "Opaque", {"password": CANARY})
    assert CANARY not in repr(value)


def registered(run_program, *values: SecretValue, anew: bool = False, left: Sequence[str] = ()):
    def program() -> None:
        host = Host("p510", Connection(settings.Host()))
        provider = kubernetes.Provider("kubernetes")
        identity = host.command("identity", ["k3d", "identity"], {}, opts=pulumi.ResourceOptions())
        cluster = Cluster(
            "factory", provider, identity, "/etc/k3d/kubeconfig", host, "0a1b2c3d-1", anew
        )
        namespaces = Namespaces("factory", NamespacesArgs({"factory": "pulumi"}, cluster))
        Secrets("factory", SecretsArgs(values, namespaces, cluster))

    answer = json.dumps({"rolled": [], "left": left})
    return run_program(program, outputs={"Command": {"stdout": answer}})


ENCODED = base64.b64encode(CANARY.encode()).decode()
MANAGED = SecretValue("factory", "db", "kubernetes.io/basic-auth", {"password": ENCODED})
SEED = SecretValue("factory", "rotated", "Opaque", {"k": ENCODED}, seed_only=True)


def test_a_secret_is_typed_secret_and_deleted_with_the_cluster(run_program):
    secret = registered(run_program, MANAGED)["Secret", "factory/db"]
    assert secret.inputs["type"] == "kubernetes.io/basic-auth"
    assert secret.inputs["data"] == {"password": ENCODED}
    assert "data" in secret.secrets
    assert secret.deleted_with == ("Command", "identity")
    assert ("Namespace", "factory") in secret.depends_on
    assert secret.provider == "kubernetes"
    assert secret.parent == ("Secrets", "factory")


def test_incident_08_a_changed_seed_is_no_change(run_program):
    resources = registered(run_program, SEED)
    assert resources.names("Secret") == []
    seed = resources["Command", "seed factory/rotated"]
    assert seed.inputs["create"] == seed.inputs["update"]
    assert seed.inputs["create"].endswith("hostctl secret seed")
    assert seed.ignore_changes == ["stdin"]
    assert "delete" not in seed.inputs
    assert "stdin" in seed.secrets
    assert seed.inputs["logging"] == "none"
    # The second is the uid of its namespace, which no mock knows.
    assert seed.inputs["triggers"] == ["0a1b2c3d-1", None]
    assert json.loads(seed.inputs["stdin"])["data"] == {"k": ENCODED}


def test_a_cluster_that_is_made_anew_gets_the_seed_of_now(run_program):
    resources = registered(run_program, SEED, anew=True)
    assert resources["Command", "seed factory/rotated"].ignore_changes == []


def test_workloads_are_rolled_when_a_value_changes_and_only_then(run_program):
    def spec(*values: SecretValue) -> dict[str, Any]:
        rollout = registered(run_program, *values)["Command", "rollout factory"]
        assert {"stdin"} <= rollout.secrets
        assert ("Secret", "factory/db") in rollout.depends_on
        return json.loads(rollout.inputs["stdin"])["secrets"]

    changed = SecretValue("factory", "db", MANAGED.type, {"password": "bmV3"})
    assert spec(MANAGED) == spec(MANAGED, SEED)
    assert spec(MANAGED).keys() == {"db"}
    assert spec(MANAGED) != spec(changed)


def test_pods_that_no_controller_makes_again_are_warned_of(run_program, caplog):
    registered(run_program, MANAGED)
    assert "kept the old value" not in caplog.text
    registered(run_program, MANAGED, left=["pod/bare"])
    assert "pod/bare in namespace factory kept the old value" in caplog.text
    assert "kubectl delete it and apply it again" in caplog.text


def test_rollout_false_leaves_the_workloads_alone(run_program):
    value = SecretValue("factory", "db", "Opaque", {"k": ENCODED}, rollout=False)
    assert registered(run_program, value).names("Command") == ["hostctl", "identity"]
