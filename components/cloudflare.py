"""The part of pulumi_cloudflare that tunnels need.

The package's own __init__ imports all of its resources, hundreds, which takes longer than the rest
of a preview together; a resource's module does without it. Whoever imports the package afterwards
gets all of its resources.
"""

import sys
from importlib.util import find_spec, module_from_spec
from typing import TYPE_CHECKING

_PACKAGE = "pulumi_cloudflare"
_spec = None if TYPE_CHECKING or _PACKAGE in sys.modules else find_spec(_PACKAGE)
if _spec:
    sys.modules[_PACKAGE] = module_from_spec(_spec)
try:
    from pulumi_cloudflare._inputs import (
        ZeroTrustTunnelCloudflaredConfigConfigIngressArgs,
        ZeroTrustTunnelCloudflaredConfigConfigIngressOriginRequestArgs,
    )
    from pulumi_cloudflare.dns_record import DnsRecord
    from pulumi_cloudflare.provider import Provider
    from pulumi_cloudflare.zero_trust_access_application import ZeroTrustAccessApplication
    from pulumi_cloudflare.zero_trust_access_policy import ZeroTrustAccessPolicy
    from pulumi_cloudflare.zero_trust_tunnel_cloudflared import ZeroTrustTunnelCloudflared
    from pulumi_cloudflare.zero_trust_tunnel_cloudflared_config import (
        ZeroTrustTunnelCloudflaredConfig,
    )
finally:
    if _spec:
        del sys.modules[_PACKAGE]

__all__ = [
    "DnsRecord",
    "Provider",
    "ZeroTrustAccessApplication",
    "ZeroTrustAccessPolicy",
    "ZeroTrustTunnelCloudflared",
    "ZeroTrustTunnelCloudflaredConfig",
    "ZeroTrustTunnelCloudflaredConfigConfigIngressArgs",
    "ZeroTrustTunnelCloudflaredConfigConfigIngressOriginRequestArgs",
]
