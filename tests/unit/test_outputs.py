"""The outputs of a stack: exported under the names that the facade reads, typed, by name if not."""

import pulumi
import pytest

import homelab

CLUSTER = homelab.Cluster(
    name="factory",
    identity="factory-0123456789abcdef",
    endpoint="https://127.0.0.1:6443",
    context="k3d-factory",
    kubeconfigPath="/etc/k3d/kubeconfig",
    storageClass="local-path",
    k3sVersion="v1.31.5+k3s1",
)
ACCEPTANCE = homelab.Acceptance(state="passed", detail="a pod resolves registry-1.docker.io")
ARGOCD = homelab.ArgoCD(
    repository="https://git.example.org/gitops", ref="main", commit="1" * 40, url=None
)
TUNNEL = homelab.Tunnel(id="1", name="factory", connector="cluster", public=[])
RESTORE = homelab.VerifiedRestore(
    at="2026-11-21T03:00:00Z", taken="2026-11-21T00:00:01Z", recoverySeconds=7.5
)
KUBECONFIG = "apiVersion: v1"

WHOLE = {
    "version": 1,
    "cluster": CLUSTER,
    "acceptance": ACCEPTANCE,
    "kubeconfig": KUBECONFIG,
    "namespaces": ["argocd"],
    "ingress": "192.168.1.240",
    "argocd": ARGOCD,
    "tunnels": {"factory": TUNNEL},
    "urls": {"argocd.example.org": "https://argocd.example.org"},
    "backups": {"offsite": {"keycloak": RESTORE}},
}

# A stack without Argo CD; one that was last brought up before its cluster was accepted; one whose
# backups were not restored yet.
MAY_LACK = ("argocd", "acceptance", "backups")


@pytest.fixture
def read(run_program):
    """The values that a consumer reads of a stack with these outputs, by attribute."""

    def run(outputs, *attributes):
        seen = {}

        def program():
            platform = homelab.Platform("organization/homelab/p510")
            for attribute in attributes:

                def keep(value, attribute=attribute):
                    seen[attribute] = value

                getattr(platform, attribute).apply(keep)

        reference = {"outputs": outputs, "secretOutputNames": ["kubeconfig"]}
        run_program(program, outputs={"StackReference": reference})
        return seen

    return run


@pytest.fixture
def exported(run_program, monkeypatch):
    """What a stack exports, as Outputs."""

    def run(**changed):
        made = {}
        monkeypatch.setattr(pulumi, "export", made.__setitem__)
        given = {name: value for name, value in {**WHOLE, **changed}.items() if name != "version"}
        run_program(lambda: homelab.export(**given))
        return made

    return run


def test_the_facade_reads_each_output_that_a_stack_exports(read, exported):
    others = ("version", "serviceAccounts")
    attributes = [name for name in exported() if name not in others]
    assert read(WHOLE, *attributes) == {name: WHOLE[name] for name in attributes}
    accounts = {"factory/deployer": "apiVersion: v1"}
    seen = read({**WHOLE, "serviceAccounts": accounts}, "service_accounts")
    assert seen == {"service_accounts": accounts}


@pytest.mark.parametrize("name", MAY_LACK)
def test_an_output_that_a_stack_may_lack_reads_as_none(read, name):
    assert read({**WHOLE, name: None}, name) == {name: None}


@pytest.mark.parametrize(
    "name", [name for name in WHOLE if name not in ("version", "ingress", *MAY_LACK)]
)
def test_a_missing_output_is_an_error_that_names_the_stack_and_the_output(read, name):
    outputs = {key: value for key, value in WHOLE.items() if key != name}
    with pytest.raises(pulumi.RunError, match=f"stack organization/homelab/p510 exports no {name}"):
        read(outputs, name)


@pytest.mark.parametrize("attribute", ["cluster", "kubeconfig", "argocd", "urls"])
def test_no_output_of_another_contract_version_is_read(read, attribute):
    with pytest.raises(pulumi.RunError, match="contract version 2"):
        read({**WHOLE, "version": 2}, attribute)


def test_a_stack_that_was_never_brought_up_is_an_error_even_if_nothing_is_read(read):
    with pytest.raises(pulumi.RunError, match="exports no version"):
        read({})


@pytest.mark.parametrize("undecrypted", [{}, ""])
def test_a_kubeconfig_that_cannot_be_decrypted_is_never_handed_on(read, undecrypted):
    with pytest.raises(pulumi.RunError, match="cannot be decrypted"):
        read({**WHOLE, "kubeconfig": undecrypted}, "kubeconfig")


def test_the_kubeconfig_is_secret_even_if_its_stack_forgot_to_say_so(run_program):
    seen = []

    async def is_secret(output):
        seen.append(await output.is_secret())

    def program():
        platform = homelab.Platform("organization/homelab/p510")
        return pulumi.Output.from_input(is_secret(platform.kubeconfig))

    reference = {"outputs": WHOLE, "secretOutputNames": []}
    run_program(program, outputs={"StackReference": reference})
    assert seen == [True]
