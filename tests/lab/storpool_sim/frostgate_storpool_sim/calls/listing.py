"""Telling what volumes and snapshots there are, and how much they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from frostgate_storpool_sim.calls.answers import objects, summary
from frostgate_storpool_sim.catalog import Item
from frostgate_storpool_sim.cluster import Cluster
from frostgate_storpool_sim.routes import Call

Extra = Callable[[Cluster, Item], dict[str, Any]]


def _nothing(cluster: Cluster, item: Item) -> dict[str, Any]:
    return {}


def _space(cluster: Cluster, item: Item) -> dict[str, Any]:
    """For a volume, `spaceUsed` counts its parents too; for a snapshot, what its deletion would free."""
    layer = cluster.layer(item)
    seen = layer.seen_bytes()
    return {"storedSize": seen, "spaceUsed": layer.own_chunks * 4096 if item.snapshot else seen}


def _chains(cluster: Cluster, item: Item) -> dict[str, Any]:
    return {"disksCount": 0, "objectsPerDisk": {}, "objectsPerChain": [], "objectsPerDiskSet": []}


def _objects(cluster: Cluster, item: Item) -> dict[str, Any]:
    return {"targetDiskSets": [], "objects": [[] for _ in range(objects(item))]}


def _quick(cluster: Cluster, item: Item) -> dict[str, Any]:
    return {
        "status": "up",
        "snapshot": item.snapshot,
        "migrating": False,
        "decreasedRedundancy": False,
        "balancerBlocked": False,
        "syncingDataBytes": 0,
        "syncingMetaObjects": 0,
        "downBytes": 0,
        "upSoonChainsCount": 0,
        "downDrives": [],
        "missingDrives": [],
        "missingTargetDrives": [],
        "softEjectingDrives": [],
    }


def _status(cluster: Cluster, item: Item) -> dict[str, Any]:
    stored = cluster.layer(item).seen_bytes()
    replication = item.policy.replication or 1
    return {**_quick(cluster, item), "storedSize": stored, "onDiskSize": stored * replication}


def _all(snapshot: bool, extra: Extra = _nothing) -> Callable[[Cluster, Call], list[dict[str, Any]]]:
    def call_(cluster: Cluster, call: Call) -> list[dict[str, Any]]:
        return [
            summary(cluster, item, multi_cluster=call.multi_cluster) | extra(cluster, item)
            for item in cluster.items.values()
            if item.snapshot is snapshot
        ]

    return call_


def _one(snapshot: bool, extra: Extra = _nothing) -> Callable[[Cluster, Call], dict[str, Any]]:
    def call_(cluster: Cluster, call: Call) -> dict[str, Any]:
        (name,) = call.arguments.values()
        item = cluster.snapshot(name) if snapshot else cluster.volume(name)
        return summary(cluster, item, multi_cluster=call.multi_cluster) | extra(cluster, item)

    return call_


def _listed(snapshot: bool) -> Callable[[Cluster, Call], list[dict[str, Any]]]:
    one = _one(snapshot)
    return lambda cluster, call: [one(cluster, call)]


def _by_name(extra: Extra) -> Callable[[Cluster, Call], dict[str, Any]]:
    def call_(cluster: Cluster, call: Call) -> dict[str, Any]:
        return {
            item.shown_name: summary(cluster, item, multi_cluster=call.multi_cluster) | extra(cluster, item)
            for item in cluster.items.values()
        }

    return call_


def volume_snapshots(cluster: Cluster, call: Call) -> list[dict[str, Any]]:
    """VolumeListSnapshots: a volume's parents, nearest first."""
    found = []
    parent = cluster.parent(cluster.volume(call.arguments["volumeName"]))
    while parent is not None:
        found.append(summary(cluster, parent))
        parent = cluster.parent(parent)
    return found


CALLS = {
    "volumesList": _all(snapshot=False),
    "volumesSpace": _all(snapshot=False, extra=_space),
    "volumeList": _listed(snapshot=False),
    "volumeInfo": _one(snapshot=False, extra=_chains),
    "volumeDescribe": _one(snapshot=False, extra=_objects),
    "volumeListSnapshots": volume_snapshots,
    "volumesStatus": _by_name(_status),
    "volumesQuickStatus": _by_name(_quick),
    "snapshotsList": _all(snapshot=True),
    "snapshotsSpace": _all(snapshot=True, extra=_space),
    "snapshotList": _listed(snapshot=True),
    "snapshotInfo": _one(snapshot=True, extra=_chains),
    "snapshotDescribe": _one(snapshot=True, extra=_objects),
}
