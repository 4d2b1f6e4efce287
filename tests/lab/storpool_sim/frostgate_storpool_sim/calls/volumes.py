"""Making, changing and deleting volumes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from frostgate_storpool_sim.calls.answers import ok
from frostgate_storpool_sim.calls.policy import changed, complete, tagged, template_named
from frostgate_storpool_sim.catalog import Item, Policy, Record
from frostgate_storpool_sim.cluster import Cluster, record_of, with_layer
from frostgate_storpool_sim.errors import invalid, no_room
from frostgate_storpool_sim.routes import Call

MAX_VOLUME_BYTES = 4 << 40


def create(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeCreate: empty, upon a snapshot (`parent`), or as a copy of a volume (`baseOn`)."""
    asked = call.json
    if asked.parent and asked.baseOn:
        raise invalid("Either parent or baseOn.")
    cluster.require_free(asked.name or "")
    template = template_named(cluster, asked.template) if asked.template else None
    parent_name = asked.parent or (template.parent if template and not asked.baseOn else "")
    parent = cluster.volume(asked.baseOn) if asked.baseOn else cluster.snapshot(parent_name) if parent_name else None
    policy = template.policy if template else parent.policy if parent else Policy()
    size = asked.size or (parent.size_bytes if parent else 0) or (template.size_bytes if template else 0)
    if not size:
        raise invalid("Missing size.")
    if parent and size < parent.size_bytes:
        raise invalid(f"The size must be at least the parent's, {parent.size_bytes}.")
    policy = complete(cluster, changed(policy, asked))
    _require_possible(cluster, size)
    tags = tagged({}, asked.tags)
    number = cluster.next_number()
    below = cluster.layer(parent) if parent else None
    with cluster.making() as make:
        layer = make(below, size)
        item = Item(
            global_id=cluster.global_id(number),
            number=number,
            name=asked.name or "",
            layer=layer.name,
            size_bytes=size,
            created=int(time.time()),
            snapshot=False,
            policy=policy,
            tags=tags,
        )
        kept: list[Record] = [item, record_of(layer)]
        if asked.baseOn and parent:
            # the copied volume leaves its layer to both, as it would to a snapshot
            onward = make(below, parent.size_bytes)
            kept += [with_layer(parent, onward), record_of(onward)]
        with cluster.bytes_lock:
            cluster.commit(kept)
    return ok(cluster, name=item.shown_name, globalId=item.global_id)


def update(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeUpdate: name, size, policy, tags."""
    asked = call.json
    item = cluster.volume(call.arguments["volumeName"])
    policy = replace(template_named(cluster, asked.template).policy) if asked.template else item.policy
    new = replace(item, policy=complete(cluster, changed(policy, asked)), tags=tagged(item.tags, asked.tags))
    if asked.rename and asked.rename != item.name:
        cluster.require_free(asked.rename)
        new = replace(new, name=asked.rename)
    if asked.size and asked.sizeAdd:
        raise invalid("Either size or sizeAdd.")
    size = asked.size or item.size_bytes + (asked.sizeAdd or 0)
    if size < item.size_bytes and not asked.shrinkOk:
        raise invalid("The volume would shrink: shrinkOk is needed.")
    _require_possible(cluster, size - item.size_bytes)
    with cluster.bytes_lock:
        layer = cluster.layer(item)
        if size != item.size_bytes:
            layer.resize(size)
        cluster.commit([replace(new, size_bytes=size), record_of(layer)])
    cluster.show_devices()
    return ok(cluster)


def delete(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeDelete: refused while attached. Its snapshots stay."""
    item = cluster.volume(call.arguments["volumeName"])
    cluster.require_detached(item)
    with cluster.bytes_lock:
        cluster.commit([], [item])
    return ok(cluster)


def revert(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeRevert: the volume has a snapshot's content and size; refused while attached."""
    item = cluster.volume(call.arguments["volumeName"])
    target = cluster.snapshot(call.json.toSnapshot)
    cluster.require_detached(item)
    with cluster.making() as make:
        layer = make(cluster.layer(target), target.size_bytes)
        with cluster.bytes_lock:
            cluster.commit([with_layer(item, layer), record_of(layer)])
    return ok(cluster)


def _require_possible(cluster: Cluster, more_bytes: int) -> None:
    if more_bytes > MAX_VOLUME_BYTES or (more_bytes > 0 and not cluster.free_bytes()):
        raise no_room()


CALLS = {
    "volumeCreate": create,
    "volumeUpdate": update,
    "volumeDelete": delete,
    "volumeRevert": revert,
}
