"""The outputs of a homelab stack: a versioned contract, and the typed way for another Pulumi
project to read it.

    from homelab import Platform

    # `organization` is the literal word on a file backend.
    p510 = Platform("organization/homelab/p510")
    pulumi.export("argocd", p510.urls["argocd.example.org"])

A stack exports each field of :class:`Platform` under its name in camelCase. Within one contract
version fields are only added.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import pulumi

CONTRACT_VERSION = 1


class Cluster(TypedDict):
    """`cluster`: ``identity`` changes exactly when it is another cluster."""

    name: str
    identity: str
    endpoint: str
    context: str
    kubeconfigPath: str
    storageClass: str
    k3sVersion: str


class Acceptance(TypedDict):
    """`acceptance`: ``state`` is passed, failed or cannot-tell: whether the cluster, after its last
    change, answered through its published port and resolved an external name from a pod.
    """

    state: str
    detail: str


class ArgoCD(TypedDict):
    """`argocd`: what ArgoCD was bootstrapped from; ``commit`` is None while nothing was applied
    yet.
    """

    repository: str
    ref: str
    commit: str | None
    url: str | None


class Tunnel(TypedDict):
    """An entry of `tunnels`, by tunnel name; ``connector`` is cluster, host or external.

    ``public`` lists the hostnames without an Access application: anyone on the internet reaches
    them.
    """

    id: str
    name: str
    connector: str
    public: list[str]


class VerifiedRestore(TypedDict):
    """An entry of `backups`, by target and item: ``at`` is when the copy was last restored and
    compared, ``taken`` when the backup was made (both RFC 3339), ``recoverySeconds`` how long the
    restore took.
    """

    at: str
    taken: str
    recoverySeconds: float


class Platform:
    """A homelab stack as its consumers see it.

    Every attribute is an Output. A stack that does not exist, has not been brought up, or speaks
    another contract version fails the consumer's preview by name; no missing output ever reads as
    an empty value.
    """

    def __init__(self, stack: str, opts: pulumi.ResourceOptions | None = None) -> None:
        self._stack = stack
        self._reference = pulumi.StackReference(stack, opts=opts)
        # Not `require_output`, whose KeyError names no stack.
        self._version = self._reference.get_output("version").apply(self._checked_version)

    @property
    def cluster(self) -> pulumi.Output[Cluster]:
        return self._read("cluster")

    @property
    def acceptance(self) -> pulumi.Output[Acceptance | None]:
        """None for a stack that was brought up before this output was added."""
        return self._read("acceptance", optional=True)

    @property
    def kubeconfig(self) -> pulumi.Output[str]:
        """YAML text; secret. Reachable where the stack's API address is: on the host itself for a
        loopback one.
        """

        def decrypted(content: Any) -> str:
            # {} takes the place of what cannot be decrypted; with a kubeconfig that names no
            # cluster, a Provider would take the ambient ~/.kube/config, another cluster.
            if not isinstance(content, str) or not content:
                raise pulumi.RunError(
                    f"the kubeconfig of stack {self._stack} cannot be decrypted. Remedy: give both"
                    " stacks the same passphrase (PULUMI_CONFIG_PASSPHRASE) or key service."
                )
            return content

        return pulumi.Output.secret(self._read("kubeconfig").apply(decrypted))

    @property
    def namespaces(self) -> pulumi.Output[list[str]]:
        return self._read("namespaces")

    @property
    def service_accounts(self) -> pulumi.Output[Mapping[str, str]]:
        """Kubeconfig, YAML text, of each service account with a lasting token, by namespace/name;
        secret. Reachable where ``kubeconfig`` is.
        """

        def decrypted(accounts: Any) -> Mapping[str, str]:
            # As for `kubeconfig`: {} takes the place of what cannot be decrypted.
            if not all(isinstance(text, str) for text in (accounts or {}).values()):
                raise pulumi.RunError(
                    f"the service accounts of stack {self._stack} cannot be decrypted. Remedy: give"
                    " both stacks the same passphrase (PULUMI_CONFIG_PASSPHRASE) or key service."
                )
            return accounts or {}

        read = self._read("serviceAccounts", optional=True)
        return pulumi.Output.secret(read.apply(decrypted))

    @property
    def ingress(self) -> pulumi.Output[str | None]:
        """The LAN's address of the ingress; None for a stack without one."""
        return self._read("ingress", optional=True)

    @property
    def argocd(self) -> pulumi.Output[ArgoCD | None]:
        """None for a stack without ArgoCD."""

        def whole(argocd: Any) -> ArgoCD | None:
            # What is null in another stack's outputs is missing here.
            return argocd and ArgoCD(**{"commit": None, "url": None, **argocd})

        return self._read("argocd", optional=True).apply(whole)

    @property
    def tunnels(self) -> pulumi.Output[Mapping[str, Tunnel]]:
        return self._read("tunnels")

    @property
    def urls(self) -> pulumi.Output[Mapping[str, str]]:
        """URL of each route by its hostname."""
        return self._read("urls")

    @property
    def backups(self) -> pulumi.Output[Mapping[str, Mapping[str, VerifiedRestore]] | None]:
        """The last verified restore by target and item, as of the stack's last up; None where there
        was none yet.
        """
        return self._read("backups", optional=True)

    def _read(self, name: str, *, optional: bool = False) -> pulumi.Output[Any]:
        def present(versioned: Sequence[Any]) -> Any:
            value = versioned[1]
            if value is None and not optional:
                raise pulumi.RunError(
                    f"stack {self._stack} exports no {name}. Remedy: bring it up (pulumi up); one"
                    " whose cluster is off (homelab:cluster.enabled) has none."
                )
            return value

        return pulumi.Output.all(self._version, self._reference.get_output(name)).apply(present)

    def _checked_version(self, version: float | None) -> int:
        if version is None:
            raise pulumi.RunError(
                f"stack {self._stack} exports no version: it was not brought up, or is no stack of"
                " homelab. Remedy: check the name, or bring it up (pulumi up)."
            )
        if int(version) != CONTRACT_VERSION:
            raise pulumi.RunError(
                f"stack {self._stack} exports outputs of contract version {version:g}; this program"
                f" reads version {CONTRACT_VERSION}. Remedy: bring both to one release of homelab."
            )
        return int(version)


def export(
    *,
    cluster: pulumi.Input[Cluster] | None,
    acceptance: pulumi.Input[Acceptance] | None,
    kubeconfig: pulumi.Input[str] | None,
    namespaces: pulumi.Input[list[str]],
    argocd: pulumi.Input[ArgoCD] | None,
    service_accounts: Mapping[str, pulumi.Input[str]] | None = None,
    ingress: pulumi.Input[str] | None = None,
    tunnels: Mapping[str, pulumi.Input[Tunnel]],
    urls: pulumi.Input[Mapping[str, str]],
    backups: Mapping[str, Mapping[str, VerifiedRestore]] | None = None,
) -> None:
    """Exports a stack's outputs under the names that :class:`Platform` reads. Where the cluster is
    off, reading ``cluster`` or ``kubeconfig`` fails by name.
    """
    pulumi.export("version", CONTRACT_VERSION)
    pulumi.export("cluster", cluster)
    pulumi.export("acceptance", acceptance)
    pulumi.export("kubeconfig", kubeconfig and pulumi.Output.secret(kubeconfig))
    pulumi.export("namespaces", namespaces)
    pulumi.export("serviceAccounts", service_accounts)
    pulumi.export("ingress", ingress)
    pulumi.export("argocd", argocd)
    pulumi.export("tunnels", tunnels)
    pulumi.export("urls", urls)
    pulumi.export("backups", backups)
