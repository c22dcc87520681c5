"""A cluster that is there already: where its kubeconfig comes from, its nodes and ranges."""

from collections.abc import Iterator
from ipaddress import IPv4Network, ip_network
from typing import Annotated, Literal

from pydantic import Field, SecretStr

from components.settings.cluster import ClusterName
from components.settings.model import AbsolutePath, Model, ObjectName, Text, is_ipv4
from components.settings.problem import HIDDEN, Problem

IPv4 = Annotated[
    str,
    Text(
        "an IPv4 address",
        "write the address with its four numbers, without mask or port",
        "192.168.1.10",
        r"[0-9.]{7,15}",
        is_ipv4,
    ),
]


def _is_network(text: str) -> bool:
    try:
        return IPv4Network(text).prefixlen <= 30
    except ValueError:
        return False


IPv4Range = Annotated[
    str,
    Text(
        "an IPv4 network such as 10.244.0.0/16, its host bits zero",
        "write the network as the cluster was set up with it",
        "10.244.0.0/16",
        r"[0-9.]{7,15}/[0-9]{1,2}",
        _is_network,
    ),
]
Interface = Annotated[
    str,
    Text(
        "the name of a network interface: letters, digits, `_`, `.` and `-`, at most 15",
        "write it as `ip link` on the node shows it",
        "enp1s0",
        r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}",
    ),
]
Context = Annotated[
    str,
    Text(
        "the name of a context of the kubeconfig",
        "write it as `kubectl config get-contexts` shows it",
        "kubernetes-admin@kubernetes",
        r"[A-Za-z0-9_][A-Za-z0-9_.:@/+-]{0,252}",
    ),
]
ServerUrl = Annotated[
    str,
    Text(
        "https://HOST or https://HOST:PORT, neither loopback nor 0.0.0.0",
        "write the address at which this machine and the host reach the API (incident 14)",
        "https://192.168.1.10:6443",
        r"https://[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?",
        lambda url: not url[8:].startswith(("127.", "0.0.0.0", "localhost")),
    ),
]
Identity = Annotated[
    str,
    Text(
        "the cluster's name, a hyphen and 16 hexadecimal digits, as a preview shows it",
        "copy it from the stack's output `cluster` or from a preview",
        "metal-0123456789abcdef",
        r"[a-z][a-z0-9-]{0,31}-[0-9a-f]{16}",
    ),
]
KubeconfigText = Annotated[
    SecretStr,
    Text(
        "a whole kubeconfig as text",
        "kubectl config view --raw --minify --flatten --context=CONTEXT | pulumi config set "
        "--secret --path 'homelab:cluster.kubeconfig.content'",
        "apiVersion: v1",
        r"[ -~\n]+",
    ),
]


class Node(Model):
    """A node of the cluster; here alone its address is written."""

    address: IPv4 = Field(description="Its address in the LAN.")
    interface: Interface | None = Field(
        default=None, description="The interface that holds the address."
    )


class KubeconfigSource(Model):
    """Where the kubeconfig comes from, `file` or `content`, and what of it is used."""

    file: AbsolutePath | None = Field(
        default=None, description="The kubeconfig's file, for example /etc/kubernetes/admin.conf."
    )
    read_on: Literal["host", "here"] = Field(
        default="host",
        description="Which machine has the file: the `host`, or the one that runs Pulumi (`here`).",
    )
    content: KubeconfigText | None = Field(
        default=None,
        description="The kubeconfig itself in place of a file, encrypted: pulumi config set "
        "--secret --path 'homelab:cluster.kubeconfig.content'.",
    )
    context: Context = Field(
        description="The context that is used, whatever current-context says. Only its cluster "
        "and user are kept."
    )
    server: ServerUrl | None = Field(
        default=None,
        description="Address of the API in place of the one in the kubeconfig, for one that says "
        "127.0.0.1 (k3s).",
    )


class ExistingCluster(Model):
    """A cluster that was set up otherwise. The stack neither makes nor deletes it."""

    kind: Literal["existing"] = Field(description="The cluster is there already.")
    name: ClusterName = Field(description="Name of the cluster here, in outputs and on the host.")
    kubeconfig: KubeconfigSource = Field(description="The way in.")
    identity: Identity | None = Field(
        default=None,
        description="What the cluster's CA certificate makes of it. Where written, any other "
        "cluster is refused; without it the preview of another cluster replaces everything.",
    )
    nodes: dict[ObjectName, Node] = Field(description="Its nodes by the name that Kubernetes has.")
    pod_subnet: IPv4Range = Field(description="The range of its pods.")
    service_subnet: IPv4Range = Field(description="The range of its Services.")
    storage_class: ObjectName = Field(
        description="Its default storage class, for volumes that name none."
    )

    def problems(self) -> Iterator[Problem]:
        """What is wrong across the fields."""
        source = self.kubeconfig
        sources = [("cluster", "kubeconfig", key) for key in ("file", "content")]
        if source.file is not None and source.content is not None:
            yield Problem(
                sources[1],
                HIDDEN,
                "either file or content",
                "keep one of the two",
                "is one source too many",
                sources,
            )
        elif source.file is None and source.content is None:
            yield Problem(
                ("cluster", "kubeconfig"),
                None,
                "file or content: without either kubectl would take the ambient ~/.kube/config, "
                "another cluster",
                "name the file (file: /etc/kubernetes/admin.conf), or encrypt the kubeconfig under "
                "content",
                "has no source",
                sources,
            )
        if not self.nodes:
            yield Problem(
                ("cluster", "nodes"),
                None,
                "at least one node, by name and address",
                "write what `kubectl get nodes -o wide` shows",
                "names no node",
            )
        if self.identity is not None and self.identity[:-17] != self.name:
            yield Problem(
                ("cluster", "identity"),
                self.identity,
                f"{self.name}- and 16 hexadecimal digits",
                "copy the whole identity that a preview shows",
                involves=[("cluster", "name")],
            )
        if ip_network(self.pod_subnet).overlaps(ip_network(self.service_subnet)):
            yield Problem(
                ("cluster", "podSubnet"),
                self.pod_subnet,
                f"a range apart from homelab:cluster.serviceSubnet, {self.service_subnet}",
                "write both as the cluster was set up with them",
                "overlaps homelab:cluster.serviceSubnet",
                [("cluster", "serviceSubnet")],
            )
