"""Changing what volumes and snapshots are, or are upon: freezing and rebasing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from frostgate_storpool_sim.calls.answers import ok
from frostgate_storpool_sim.catalog import Item
from frostgate_storpool_sim.cluster import Cluster, record_of, with_layer
from frostgate_storpool_sim.errors import invalid
from frostgate_storpool_sim.layers import Layer
from frostgate_storpool_sim.routes import Call

_CHUNKS = 256


def freeze(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeFreeze: the volume becomes a snapshot; refused while attached."""
    item = cluster.volume(call.arguments["volumeName"])
    cluster.require_detached(item)
    with cluster.bytes_lock:
        cluster.commit([replace(item, snapshot=True, origin=item.global_id, origin_number=item.number)])
    return ok(cluster)


def rebase_volume(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeRebase: upon a snapshot higher up, or upon nothing."""
    return _rebase(cluster, cluster.volume(call.arguments["volumeName"]), call.json.parentName)


def rebase_snapshot(cluster: Cluster, call: Call) -> dict[str, Any]:
    """SnapshotRebase: the same for a snapshot."""
    return _rebase(cluster, cluster.snapshot(call.arguments["snapshotName"]), call.json.parentName)


def _rebase(cluster: Cluster, item: Item, onto: str | None) -> dict[str, Any]:
    """Copy what lies between into the item's own layer, which others may be upon: they see no difference."""
    goal = cluster.layer(cluster.snapshot(onto)) if onto else None
    layer = cluster.layer(item)
    between = _between(layer, goal)
    with cluster.bytes_lock:
        for below in between:
            for first, count in list(below.runs()):
                for start in range(first, first + count, _CHUNKS):
                    layer.take_over(start, min(_CHUNKS, first + count - start))
            layer.skip_parent()
        cluster.commit([with_layer(item, layer), record_of(layer)])
    return ok(cluster)


def _between(layer: Layer, goal: Layer | None) -> list[Layer]:
    found = []
    below = layer.parent
    while below is not goal:
        if below is None:
            raise invalid("The new parent must be one of the present ones.")
        found.append(below)
        below = below.parent
    return found


CALLS = {
    "volumeFreeze": freeze,
    "volumeRebase": rebase_volume,
    "snapshotRebase": rebase_snapshot,
}
