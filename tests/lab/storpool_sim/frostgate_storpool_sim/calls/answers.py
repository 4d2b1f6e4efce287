"""Volumes, snapshots and the like as the API tells them."""

from __future__ import annotations

from typing import Any

from frostgate_storpool_sim.catalog import Item, Policy
from frostgate_storpool_sim.cluster import Cluster

OBJECT_BYTES = 32 << 20


def ok(cluster: Cluster, **more: Any) -> dict[str, Any]:
    """Return the answer to a change that was made."""
    return {"ok": True, "generation": cluster.generation, **more}


def summary(cluster: Cluster, item: Item, *, multi_cluster: bool = False) -> dict[str, Any]:
    """Return a VolumeSummary or SnapshotSummary."""
    parent = cluster.parent(item)
    answer = {
        "name": item.shown_name,
        "id": item.number,
        "globalId": item.global_id,
        "visibleVolumeId": item.number,
        "parentName": parent.shown_name if parent else "",
        "parentVolumeId": parent.number if parent else 0,
        "originalParentVolumeId": parent.number if parent else 0,
        "size": item.size_bytes,
        "objectsCount": objects(item),
        "creationTimestamp": item.created,
        "tags": item.tags,
        "flags": 0,
        "templateId": 0,
        "firstNotParentObjectId": 0,
        "templateName": item.policy.template,
        **placement(item.policy),
    }
    if multi_cluster:
        answer |= {"clusterName": cluster.settings.name, "clusterId": cluster.settings.cluster_id}
    return answer | _of_snapshot(cluster, item) if item.snapshot else answer


def placement(policy: Policy) -> dict[str, Any]:
    """Return what a policy is, with "-" for what it does not say."""
    return {
        "replication": policy.replication or "-",
        "placeAll": policy.place_all or "-",
        "placeTail": policy.place_tail or "-",
        "placeHead": policy.place_head or "-",
        "bw": policy.bw,
        "iops": policy.iops,
        "limitType": policy.limit_type,
        "reuseServer": policy.reuse_server,
    }


def objects(item: Item) -> int:
    """Return how many 32 MiB objects there would be."""
    return -(-item.size_bytes // OBJECT_BYTES)


def _of_snapshot(cluster: Cluster, item: Item) -> dict[str, Any]:
    volume = cluster.child_volume(item)
    return {
        "onVolume": volume.shown_name if volume else "-",
        "autoName": item.automatic_name,
        "bound": item.bound,
        "deleted": item.deleted,
        "deleteBlocked": "multiple children" if item.deleted else "not blocked",
        "transient": False,
        "targetDeleteDate": item.delete_at,
        "recoveringFromRemote": False,
        "backup": False,
        "createdFromVisibleVolumeId": item.origin_number,
        "createdFromGlobalId": item.origin or None,
    }
