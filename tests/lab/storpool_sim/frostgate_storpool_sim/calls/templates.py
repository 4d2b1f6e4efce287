"""Volume templates, and the placement groups that they name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from frostgate_storpool_sim.calls.answers import ok, placement
from frostgate_storpool_sim.calls.policy import changed, template_named
from frostgate_storpool_sim.catalog import Item, Policy, Record, Template
from frostgate_storpool_sim.cluster import Cluster
from frostgate_storpool_sim.errors import busy, exists
from frostgate_storpool_sim.routes import Call


def templates(cluster: Cluster, call: Call) -> list[dict[str, Any]]:
    """VolumeTemplatesList."""
    return [_described(template) for template in cluster.table(Template).values()]


def describe(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeTemplateDescribe."""
    return _described(template_named(cluster, call.arguments["templateName"]))


def create(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeTemplateCreate."""
    asked = call.json
    if asked.name in cluster.table(Template):
        raise exists("VolumeTemplate", asked.name)
    if asked.parent:
        cluster.snapshot(asked.parent)
    policy = replace(changed(Policy(), asked), template=asked.name)
    cluster.commit([Template(asked.name, cluster.next_number(), policy, asked.size or 0, asked.parent or "")])
    return ok(cluster)


def update(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeTemplateUpdate; with `propagate`, also of what was made with it."""
    asked = call.json
    old = template_named(cluster, call.arguments["templateName"])
    name = asked.rename or old.name
    if name != old.name and name in cluster.table(Template):
        raise exists("VolumeTemplate", name)
    new = replace(
        old,
        name=name,
        policy=replace(changed(old.policy, asked), template=name),
        size_bytes=asked.size or old.size_bytes,
        parent=asked.parent or old.parent,
    )
    kept: list[Record] = [new]
    for item in _made_with(cluster, old):
        policy = new.policy if asked.propagate else replace(item.policy, template=name)
        kept.append(replace(item, policy=policy))
    with cluster.bytes_lock:
        cluster.commit(kept, [old] if name != old.name else [])
    return ok(cluster)


def delete(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeTemplateDelete; refused while something is made with it."""
    template = template_named(cluster, call.arguments["templateName"])
    if _made_with(cluster, template):
        raise busy(f"VolumeTemplate '{template.name}' is in use.")
    cluster.commit([], [template])
    return ok(cluster)


def status(cluster: Cluster, call: Call) -> list[dict[str, Any]]:
    """VolumeTemplatesStatus: how much there is of each, and how much room the cluster has."""
    return [_status(cluster, template) for template in cluster.table(Template).values()]


def _made_with(cluster: Cluster, template: Template) -> list[Item]:
    return [item for item in cluster.items.values() if item.policy.template == template.name]


def _described(template: Template) -> dict[str, Any]:
    return {
        "id": template.number,
        "name": template.name,
        "parentName": template.parent,
        "size": template.size_bytes or "-",
        **placement(template.policy),
    }


def _status(cluster: Cluster, template: Template) -> dict[str, Any]:
    made = _made_with(cluster, template)
    volumes = [item for item in made if not item.snapshot]
    snapshots = [item for item in made if item.snapshot]
    childless = [item for item in snapshots if not cluster.child_volume(item)]
    replication = template.policy.replication or 1
    stored = sum(cluster.layer(item).own_chunks * 4096 for item in made)
    size = sum(item.size_bytes for item in volumes)
    free, capacity = cluster.free_bytes(), cluster.settings.capacity_bytes
    entry = {"free": free, "capacity": capacity, "internal": {"u1": 0, "u2": 0, "u3": 0}}
    policy = placement(template.policy)
    return {
        "id": template.number,
        "name": template.name,
        **{key: policy[key] for key in ("placeAll", "placeTail", "placeHead", "replication")},
        "volumesCount": len(volumes),
        "snapshotsCount": len(snapshots),
        "removingSnapshotsCount": sum(item.deleted for item in snapshots),
        "size": size,
        "totalSize": size * replication,
        "storedSize": stored,
        "onDiskSize": stored * replication,
        "volumesSize": size,
        "snapshotsWithoutChildrenSize": sum(item.size_bytes for item in childless),
        "snapshotsWithChildrenSize": sum(item.size_bytes for item in snapshots if item not in childless),
        **{f"available{place}": free * replication for place in ("PlaceAll", "PlaceTail", "PlaceHead")},
        **{f"capacity{place}": capacity * replication for place in ("PlaceAll", "PlaceTail", "PlaceHead")},
        "stored": {**entry, "placeAll": entry, "placeTail": entry, "placeHead": entry},
    }


CALLS = {
    "volumeTemplatesList": templates,
    "volumeTemplatesStatus": status,
    "volumeTemplateDescribe": describe,
    "volumeTemplateCreate": create,
    "volumeTemplateUpdate": update,
    "volumeTemplateDelete": delete,
}
