"""A cluster that is there already: the declared one or none, and it is never made or deleted."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pulumi
import pytest
import yaml

from components import settings
from components.cluster import kinds
from components.host import Connection, Host, HostError, this_machine
from rehearsal import existing
from tests.unit.conftest import Registered

FIXTURE = Path(__file__).parent / "settings" / "valid" / "existing-cluster.yaml"
CONFIG = {
    key.removeprefix("homelab:"): value
    for key, value in yaml.safe_load(FIXTURE.read_text()).items()
}
RAW: dict[str, Any] = CONFIG["cluster"]
KUBECONFIG: dict[str, Any] = yaml.safe_load(existing.kubeconfig(RAW))
UNCHECKED = {"insecure-skip-tls-verify": True}
NODES = {
    "control-plane": {
        "addresses": ["192.168.1.130"], "ready": True, "version": "v1.31.5", "excluded": True,
    },
    "worker-1": {
        "addresses": ["192.168.1.100"], "ready": True, "version": "v1.31.4", "excluded": False,
    },
}  # fmt: skip
ANSWER = {"ok": True, "state": "reachable", "detail": "", "nodes": NODES, "servicelb": []}


def stack(**cluster: Any) -> settings.Settings:
    changed = {**CONFIG, "cluster": {**RAW, **cluster}}
    if "identity" not in cluster:
        changed["cluster"].pop("identity")
    return settings.Settings.model_validate(changed, by_alias=True, by_name=False)


def edited(edit: Callable[[dict[str, Any]], Any]) -> str:
    config = json.loads(json.dumps(KUBECONFIG))
    edit(config)
    return yaml.safe_dump(config)


@pytest.fixture
def run(run_program: Callable[..., Registered]) -> Callable[..., Any]:
    """Reads the cluster and registers it; returns what was registered and the read cluster."""

    def run(
        declared: settings.Settings | None = None,
        text: str | None = None,
        preview: bool = True,
        **answer: Any,
    ) -> tuple[Registered, kinds.Kind, list[dict[str, Any]]]:
        made: list[kinds.Kind] = []
        asked: list[dict[str, Any]] = []

        def called(args: Any) -> dict[str, Any]:
            [[_, given]] = json.loads(args.args["stdin"])["questions"]
            asked.append(given)
            if "files" in given:
                (file,) = given["files"]
                content = base64.b64encode((text or yaml.safe_dump(KUBECONFIG)).encode()).decode()
                seen = {"state": "present", "content": content, "detail": ""}
                result = {"ok": True, "files": {file["path"]: seen}, "made_up": []}
            else:
                result = {**ANSWER, **answer}
            return {"stdout": json.dumps(result), "stderr": ""}

        def program() -> None:
            whole = declared or stack()
            connection = Connection(whole.host)
            kind = connection.read(kinds.read(whole, connection))
            made.append(kind)
            kind.announce()
            declared_cluster = kind.declare(Host("metal", connection), None)
            pulumi.export("cluster", declared_cluster.output)

        registered = run_program(program, calls={"command:local:run": called}, preview=preview)
        return registered, made[0], asked

    return run


def written(registered: Registered) -> dict[str, Any]:
    spec = json.loads(registered["Command", "kubeconfig"].inputs["stdin"])
    return {**spec, "content": yaml.safe_load(spec["content"])}


def test_only_the_named_context_is_taken_whatever_the_file_calls_current(run: Any) -> None:
    assert KUBECONFIG["current-context"] == "elsewhere"
    content = written(run()[0])["content"]
    assert content["current-context"] == "metal"
    assert [one["cluster"]["server"] for one in content["clusters"]] == [
        "https://192.168.1.130:6443"
    ]
    assert len(content["contexts"]) == len(content["users"]) == 1


def test_the_kubeconfig_is_secret_everywhere(run: Any) -> None:
    registered, kind, _ = run()
    command = registered["Command", "kubeconfig"]
    assert "stdin" in command.secrets
    assert command.inputs["logging"] == "none"
    assert written(registered)["mode"] == "0600"
    assert registered["kubernetes", "kubernetes"].secrets == {"kubeconfig"}
    assert existing.made_up(RAW)["key"] not in repr(kind) + repr(vars(kind))


def test_the_provider_hangs_on_the_clusters_identity_alone(run: Any) -> None:
    def identifier(**changes: Any) -> str:
        return run(**changes)[0]["kubernetes", "kubernetes"].inputs["clusterIdentifier"]

    same = identifier()

    def renew(config: dict[str, Any]) -> None:
        config["users"][0]["user"]["client-certificate-data"] = "cmVuZXdlZA=="

    assert identifier(text=edited(renew)) == same
    source = {**RAW["kubeconfig"], "server": "https://api.example.org"}
    assert identifier(declared=stack(kubeconfig=source)) == same

    def another(config: dict[str, Any]) -> None:
        for one in config["clusters"]:
            one["cluster"]["certificate-authority-data"] = "b3RoZXI="

    assert identifier(text=edited(another)) != same


def test_nothing_is_deleted_with_a_cluster_that_outlives_the_stack(run: Any) -> None:
    registered, _, _ = run()
    # The file on the host is the stack's own; the cluster is not.
    assert registered["Command", "kubeconfig"].inputs["delete"].endswith("hostctl files remove")
    assert not any(one.deleted_with for one in registered.values())


def test_the_kubeconfig_in_the_settings_needs_no_file(run: Any) -> None:
    source = {"context": RAW["kubeconfig"]["context"], "content": existing.kubeconfig(RAW)}
    registered, _, asked = run(stack(kubeconfig=source))
    assert not any("files" in one for one in asked)
    assert written(registered)["content"]["current-context"] == "metal"


def test_a_cluster_that_is_not_the_declared_one_is_refused_with_both_identities(run: Any) -> None:
    with pytest.raises(HostError, match=r"declared metal-0123456789abcdef, but .* is metal-"):
        run(stack(identity="metal-0123456789abcdef"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{}", "holds no cluster"),
        ("clusters: []", "holds no cluster"),
        ("\t: not yaml: [", "holds no cluster"),
        (edited(lambda c: c["contexts"].pop()), "it has no context kubernetes-admin@kubernetes"),
        (
            edited(lambda c: c["clusters"][1]["cluster"].pop("certificate-authority-data")),
            "no certificate-authority-data",
        ),
        (
            edited(
                lambda c: c["clusters"][1]["cluster"].update({"insecure-skip-tls-verify": True})
            ),
            "no certificate-authority-data",
        ),
        (
            edited(lambda c: c["users"][0].update(user={"exec": {"command": "login"}})),
            "neither client-certificate-data",
        ),
        (
            edited(lambda c: c["clusters"][1]["cluster"].update(server="https://127.0.0.1:6443")),
            "only the server itself finds it",
        ),
        (edited(lambda c: c["clusters"][1]["cluster"].pop("server")), "no address"),
    ],
)
def test_a_kubeconfig_that_could_lead_elsewhere_is_refused_before_anything_is_asked(
    run: Any, text: str, why: str
) -> None:
    with pytest.raises(HostError, match=why) as refused:
        run(text=text)
    assert "Remedy" in str(refused.value)
    assert existing.made_up(RAW)["key"] not in str(refused.value)


def test_a_missing_file_names_the_machine_and_the_setting(run_program: Any) -> None:
    absent = {"state": "absent", "content": None, "detail": "there is no such file"}
    answer = {"ok": True, "files": {"/etc/kubernetes/admin.conf": absent}, "made_up": []}
    calls = {"command:local:run": {"stdout": json.dumps(answer), "stderr": ""}}
    with pytest.raises(HostError, match=r"cluster\.kubeconfig\.file: .* on this machine is absent"):
        run_program(lambda: this_machine().read(kinds.read(stack(), this_machine())), calls=calls)


def test_a_cluster_that_does_not_answer_stops_an_up_and_only_warns_a_preview(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    down = {"state": "unreachable", "detail": "i/o timeout", "nodes": {}}
    registered, kind, _ = run(**down)
    assert not kind.answers
    assert "does not answer at https://192.168.1.130:6443: i/o timeout" in caplog.text
    # Its Check must not skip, or the preview would hide every edit.
    assert registered["kubernetes", "kubernetes"].inputs["skipUpdateUnreachable"] == "false"
    with pytest.raises(HostError, match=r"does not answer .* Nothing was changed"):
        run(preview=False, **down)


def test_a_live_address_that_contradicts_the_settings_is_refused(run: Any) -> None:
    moved = {**NODES, "worker-1": {**NODES["worker-1"], "addresses": ["192.168.1.140"]}}
    with pytest.raises(HostError, match=r"worker-1\.address: declared 192\.168\.1\.100, live"):
        run(nodes=moved)


def test_an_undeclared_node_in_a_pool_is_refused_and_elsewhere_told(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    new = {
        "addresses": ["fd00::7", "192.168.1.50"],
        "ready": True,
        "version": "",
        "excluded": False,
    }
    run(nodes={**NODES, "worker-2": new})
    assert "node worker-2 is not declared" in caplog.text
    with pytest.raises(HostError, match=r"pools\[0\].* 192\.168\.1\.241, which node worker-2"):
        run(nodes={**NODES, "worker-2": {**new, "addresses": ["192.168.1.241"]}})


def test_k3ss_load_balancer_beside_metallb_is_refused(run: Any) -> None:
    with pytest.raises(HostError, match=r"svclb-traefik-1\).*--disable=servicelb"):
        run(servicelb=["svclb-traefik-1"])


def test_a_lost_node_changes_nothing_and_is_told(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = {key: one.inputs for key, one in run()[0].items()}
    lost = {**NODES, "worker-1": {**NODES["worker-1"], "ready": False}}
    after = {key: one.inputs for key, one in run(nodes=lost)[0].items()}
    assert after == before
    assert "node worker-1 is not ready" in caplog.text
