"""One resource of each package that p510 uses: what any program with these packages costs."""

import pulumi
import pulumi_cloudflare as cloudflare
import pulumi_command as command
import pulumi_docker as docker
import pulumi_kubernetes as kubernetes

KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{name: floor, cluster: {server: "https://127.0.0.1:6443"}}]
contexts: [{name: floor, context: {cluster: floor, user: floor}}]
users: [{name: floor, user: {}}]
current-context: floor
"""

command.local.Command("floor")
docker.RemoteImage("floor", name="rancher/k3s:v1.31.5-k3s1", keep_locally=True)
kubernetes.core.v1.Namespace(
    "floor",
    metadata={"name": "floor"},
    opts=pulumi.ResourceOptions(
        provider=kubernetes.Provider("floor", kubeconfig=pulumi.Output.secret(KUBECONFIG))
    ),
)
cloudflare.DnsRecord(
    "floor",
    zone_id="0" * 32,
    name="floor.example.org",
    type="CNAME",
    content="example.org",
    proxied=True,
    ttl=1,
    opts=pulumi.ResourceOptions(
        provider=cloudflare.Provider("floor", api_token=pulumi.Output.secret("0" * 40))
    ),
)
