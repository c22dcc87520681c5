"""What is there already: what the nodes bring for volumes, and the cluster's classes."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pulumi

from components import settings
from components.host import Connection, HostError, Reading, ask
from components.storage.tiers import LABELS

_PART_OF = LABELS["app.kubernetes.io/part-of"]


def check_nodes(
    storage: settings.Storage, nodes: Mapping[str, Connection], declared: list[str]
) -> None:
    """Refuses nodes that lack what the classes need of them: an iSCSI initiator with a name of its
    own, kernel modules, raw disks. ``nodes`` are those that a Connection leads to; of the others in
    ``declared``, and of those that do not answer, it only warns.

    Raises HostError with all that is missing on all of them.
    """
    needs = needs_of(storage)
    if not needs:
        return
    problems: list[str] = []
    unseen = {name: "not reached by this stack" for name in declared if name not in nodes}
    initiators: dict[str, list[str]] = defaultdict(list)
    for name, connection in nodes.items():
        disks = storage.ceph.nodes.get(name, []) if storage.ceph else []
        spec = {"needs": needs, "disks": disks}
        try:
            seen = connection.read(ask(["storage", "check"], spec))
        except HostError as failure:
            # A lost node keeps nobody from the others.
            unseen[name] = str(failure).partition("\n")[0]
            continue
        for finding in seen["findings"]:
            text = f"node {name}: {finding['what']}.\n    Remedy: {finding['remedy']}"
            if finding["severity"] == "error":
                problems.append(text)
            else:
                pulumi.log.warn(text)
        if seen["initiator"]:
            initiators[seen["initiator"]].append(name)
    if "iscsi" in needs:
        for initiator, names in initiators.items():
            if len(names) > 1:
                problems.append(
                    f"nodes {', '.join(names)} have the same iSCSI name, {initiator}, as copies of"
                    " one machine do: a target takes them for one.\n    Remedy: `iscsi-iname` makes"
                    " a name; write it into /etc/iscsi/initiatorname.iscsi of all but one and"
                    " restart iscsid"
                )
    if problems:
        raise HostError(
            f"homelab:storage.classes: {len(problems)} prerequisite(s) of their kinds are"
            " missing; nothing was changed:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    if unseen:
        why = "; ".join(f"{name}: {reason}" for name, reason in sorted(unseen.items()))
        pulumi.log.warn(
            f"homelab:storage.classes: {', '.join(sorted(unseen))} cannot be looked at from here"
            f" ({why}). What a node must have ({', '.join(needs)}): docs/storage.md, checked there"
            " by hand"
        )


def needs_of(storage: settings.Storage) -> list[str]:
    """What a node must have for the declared classes, as `hostctl storage check` takes it."""
    needs: list[str] = []
    for one in storage.classes.values():
        if isinstance(one, settings.LonghornClass):
            # Its volumes for many writers are NFS between the nodes.
            needs += ["iscsi", "nfs-client"]
            if one.encryption:
                needs.append("crypt")
        elif isinstance(one, settings.IscsiClass):
            needs.append("iscsi")
        elif isinstance(one, settings.NfsClass):
            # The driver brings the rest.
            needs.append("nfs")
        elif isinstance(one, settings.CephBlockClass | settings.CephFilesystemClass):
            needs.append("ceph")
    return list(dict.fromkeys(needs))


def check_classes(
    storage: settings.Storage,
    cluster: str,
    kubeconfig: str | None = None,
    own: settings.StorageClass | None = None,
) -> Reading[None]:
    """Refuses a second default class, and the removal of a class or volume that a claim holds.

    ``kubeconfig`` is the text of the way in, where it is none of k3d's; ``own`` the class that a
    k3d cluster has without tiers, beside k3s's own, both of them marked: of several Kubernetes
    takes the newest, which must be this one. The cluster answers; where
    it has stopped to, nothing is refused: the run that would change it fails by itself.
    """
    seen = yield from ask(["storage", "inspect"], {"cluster": cluster, "kubeconfig": kubeconfig})
    problems: list[str] = []
    luns = {
        name
        for one in storage.classes.values()
        if isinstance(one, settings.IscsiClass)
        for name in one.volumes
    }
    gone = {
        name
        for name, one in seen["classes"].items()
        if one["part_of"] == _PART_OF and name not in storage.classes
    }
    held: dict[str, list[str]] = defaultdict(list)
    for name, volume in seen["volumes"].items():
        if volume["phase"] != "Bound":
            continue
        if volume["class"] in gone:
            held[volume["class"]].append(volume["claim"])
        elif volume["part_of"] == _PART_OF and name not in luns:
            problems.append(
                f"volume {name} is not declared any more, but claim {volume['claim']} has it.\n"
                "    Remedy: delete the claim first, or declare the volume again"
            )
    for name, claims in held.items():
        shown = ", ".join(sorted(claims)[:5]) + (", ..." if len(claims) > 5 else "")
        problems.append(
            f"class {name} is not declared any more, but {len(claims)} claim(s) have volumes of it:"
            f" {shown}.\n    Remedy: move their data to another class first (docs/storage.md), or"
            " declare the class again"
        )
    if storage.declared:
        for name, one in seen["classes"].items():
            if one["default"] and name != storage.default and one["part_of"] != _PART_OF:
                problems.append(
                    f"class {name} ({one['provisioner']}), which is not this stack's, is marked as"
                    f" default beside {storage.default}.\n    Remedy: {_unmark(name)}"
                )
    elif own and own.default and own.name in seen["classes"]:
        mine = {**seen["classes"][own.name], "default": True}
        taken = _taken({**seen["classes"], own.name: mine})
        if taken != own.name:
            problems.append(
                f"claims that name no class get {taken}, which is newer than {own.name}"
                " (homelab:cluster.storageClass).\n    Remedy: kubectl delete storageclass"
                f" {own.name}, then pulumi up --refresh, which makes it anew: volumes stay"
            )
    if problems:
        raise HostError(
            "homelab:storage: the cluster's volumes do not allow it; nothing was changed:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )


def _taken(classes: dict[str, Any]) -> str:
    """Which of the marked classes Kubernetes takes: the newest, of several the first by name."""
    marked = {name: one["created"] for name, one in sorted(classes.items()) if one["default"]}
    return max(marked, key=lambda name: marked[name], default="")


def _unmark(name: str) -> str:
    if name == "local-path":
        return (
            "k3s marks it again at each start: start its servers with --disable=local-storage and"
            " set homelab:storage.localPath.provisioner: stack, or write"
            " homelab:storage.default: local-path"
        )
    return (
        f"kubectl annotate storageclass {name} --overwrite"
        " storageclass.kubernetes.io/is-default-class=false, or name it in homelab:storage.default"
    )
