"""What runs on the host when Pulumi has left: the start at boot, cleaning, backups, watching."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pulumi

import homelab
from components import settings
from components.host import Host, Reading, ask, result

# What the start may take beside the wait for the API: the bind address, and starting containers.
_SLACK_SECONDS = 900


@dataclass(frozen=True)
class LiveUnits:
    """What `hostctl units status` saw. The generation stands still while the host has what is
    declared (design rule 3).
    """

    init: str
    generation: int
    verified: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """The last verified restore by target and item of the backups."""
    failed: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, stack: settings.Settings) -> "Reading[LiveUnits]":
        """Asks the host. Raises HostError when the host has no init that hostctl knows."""
        seen = yield from ask(["units", "status"], units_spec(stack))
        return cls(
            init=seen["init"],
            generation=seen["generation"],
            verified=seen["verified"],
            failed=seen["failed"],
            notes=seen["notes"],
            unseen=seen["unseen"],
        )

    @property
    def output(self) -> dict[str, dict[str, homelab.VerifiedRestore]]:
        """The last verified restore, as consumers of the stack read it."""
        return {
            target: {
                item: homelab.VerifiedRestore(
                    at=seen["at"], taken=seen["taken"], recoverySeconds=seen["recovery_seconds"]
                )
                for item, seen in items.items()
            }
            for target, items in self.verified.items()
        }

    def announce(self, host: str) -> None:
        """Warns of what failed since somebody last looked, with the remedy (incident 17)."""
        for failed in self.failed:
            pulumi.log.warn(
                f"{failed['unit']} on {host} has failed: {failed['result']}."
                f" Remedy: {failed['remedy']}"
            )
        for note in self.notes:
            pulumi.log.warn(f"units on {host}: {note}")
        for unseen in self.unseen:
            pulumi.log.warn(f"not seen on {host}: {unseen}")


def units_spec(stack: settings.Settings) -> dict[str, Any]:
    """The settings as `hostctl units status` and `install` take them."""
    cluster, backups = stack.cluster, stack.backups
    if isinstance(cluster, settings.K3dCluster):
        own = {
            "init": stack.host.init,
            "storage_dir": cluster.storage_dir,
            "start_seconds": cluster.api_wait_seconds + _SLACK_SECONDS,
            "clean": _schedule(stack.cleaning.schedule),
        }
    elif isinstance(cluster, settings.K3sCluster):
        # It starts by a unit of its own, and its kubelet cleans.
        own = {"init": "systemd", "storage_dir": None, "start_seconds": _SLACK_SECONDS}
        own |= {"clean": None}
    else:
        raise TypeError(f"cluster {cluster.name} has no host whose units these were")
    return {
        "cluster": cluster.name,
        "hostctl": stack.host.hostctl,
        **own,
        "watch": _schedule(stack.watching.schedule),
        "watching": _watched(stack, cluster),
        "backup": _schedule(backups.schedule),
        "keep": backups.keep,
        "items": [
            {"name": name, **item.model_dump(mode="json")} for name, item in backups.items.items()
        ],
        "targets": [
            {
                "name": name,
                "kind": target.kind,
                "repository": target.repository,
                "region": target.region if isinstance(target, settings.S3Target) else None,
                **{f"keep_{key}": value for key, value in target.retention.model_dump().items()},
            }
            for name, target in backups.targets.items()
        ],
        "verify": _schedule(backups.verify.schedule),
        "verified_within_days": backups.verify.within_days,
        "scratch": backups.verify.directory,
    }


def secret_files(stack: settings.Settings) -> dict[str, str]:
    """The files of the host that hold what its units may not be told otherwise, and their content:
    of each target of backups its password, of S3 also the keys in the form of AWS's own tools; the
    URL of the webhook.
    """
    files = {}
    for name, target in stack.backups.targets.items():
        place = f"/var/lib/homelab/backups/{stack.cluster.name}/{name}"
        files[f"{place}.password"] = f"{target.password.get_secret_value()}\n"
        if isinstance(target, settings.S3Target):
            files[f"{place}.credentials"] = (
                f"[default]\naws_access_key_id = {target.access_key.get_secret_value()}\n"
                f"aws_secret_access_key = {target.secret_key.get_secret_value()}\n"
            )
    webhook = stack.watching.webhook
    if webhook and webhook.url:
        files[_webhook_file(stack.cluster.name)] = webhook.url.get_secret_value()
    return files


def _watched(
    stack: settings.Settings, cluster: settings.K3dCluster | settings.K3sCluster
) -> dict[str, Any]:
    """The settings as `hostctl watch run` takes them; the webhook's URL is a secret, and is not
    among them.
    """
    webhook = stack.watching.webhook
    on_k3d = isinstance(cluster, settings.K3dCluster)
    asked = cluster.acceptance if on_k3d else settings.Acceptance()
    hostnames = {
        route.hostname: None
        for tunnel in stack.tunnels.values()
        for route in tunnel.routes
        if route.service.startswith(("http://", "https://")) and "*" not in route.hostname
    }
    return {
        "cluster": cluster.name,
        "storage_dir": cluster.storage_dir if on_k3d else None,
        "api": None if on_k3d else cluster.server,
        "dns": {"name": asked.name, "image": asked.image},
        "argocd": stack.argocd is not None,
        "routes": list(hostnames),
        "metrics": stack.watching.metrics,
        "webhook": webhook and webhook.kind,
        "webhook_file": webhook and (webhook.file or _webhook_file(cluster.name)),
    }


def _webhook_file(cluster: str) -> str:
    return f"/var/lib/homelab/watch/{cluster}.webhook"


def _schedule(schedule: str) -> str | None:
    return None if schedule == "never" else schedule


@dataclass(frozen=True)
class UnitsArgs:
    """``live`` is what the host holds now; ``after`` must be up before the start is tried."""

    settings: settings.Settings
    live: LiveUnits
    host: Host
    after: Sequence[pulumi.Resource]


class Units(pulumi.ComponentResource):
    """The host's units of a cluster, one Command around `hostctl units install`, and one for each
    file of secrets: the keys of its backups' targets and the webhook's URL. `destroy` removes them,
    and leaves the backups.
    """

    installed: pulumi.Output[list[str]]
    """Names of the units that the host runs."""

    def __init__(
        self, name: str, args: UnitsArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:Units", name, None, opts)
        spec = units_spec(args.settings)
        files = [
            args.host.command(
                path.rpartition("/")[2],
                ["files", "write"],
                {"path": path, "content": content, "mode": "0600"},
                secret=True,
                delete=["files", "remove"],
                opts=pulumi.ResourceOptions(parent=self),
            )
            for path, content in secret_files(args.settings).items()
        ]
        # The start is tried once, in the unit's own bounds.
        wait = f"{spec['start_seconds'] + _SLACK_SECONDS}s"
        install = args.host.command(
            "units",
            ["units", "install"],
            {**spec, "generation": args.live.generation},
            delete=["units", "remove"],
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=[*args.after, *files],
                custom_timeouts=pulumi.CustomTimeouts(create=wait, update=wait),
            ),
        )
        self.installed = result(install).apply(lambda seen: seen["units"])
        self.register_outputs({"installed": self.installed})
