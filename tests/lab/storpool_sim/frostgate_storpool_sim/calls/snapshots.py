"""Snapshots: of one volume, of several at one instant; changing and deleting them."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from storpool import sptypes

from frostgate_storpool_sim.calls.answers import ok
from frostgate_storpool_sim.calls.policy import changed, complete, tagged, template_named
from frostgate_storpool_sim.catalog import Item
from frostgate_storpool_sim.cluster import Cluster, record_of, require_all_different, with_layer
from frostgate_storpool_sim.errors import invalid, no_room
from frostgate_storpool_sim.routes import Call

MAX_GROUP = 4096
_SNAPSHOT_NAME = re.compile(sptypes.SNAPSHOT_NAME_REGEX)


@dataclass(frozen=True)
class Wanted:
    """One snapshot to be made; `name` may be ""."""

    volume: Item
    name: str
    tags: dict[str, str]
    bound: bool = False
    delete_at: int = 0


def cut(cluster: Cluster, wanted: Sequence[Wanted]) -> list[Item]:
    """Make snapshots of volumes at one instant between two writes: all of them, or none. Raises Refused.

    A volume's layer becomes the snapshot's, and the volume gets an empty one upon it.
    """
    require_all_different([each.volume.shown_name for each in wanted])
    require_all_different([each.name for each in wanted if each.name])
    for each in wanted:
        cluster.require_free(each.name)
    if not cluster.free_bytes():
        raise no_room()
    snapshots = []
    for each in wanted:
        number = cluster.next_number()
        snapshots.append(
            replace(
                each.volume,
                global_id=cluster.global_id(number),
                number=number,
                name=each.name or _automatic_name(each.volume, number),
                automatic_name=not each.name,
                created=int(time.time()),
                snapshot=True,
                tags=each.tags,
                origin=each.volume.global_id,
                origin_number=each.volume.number,
                bound=each.bound,
                delete_at=each.delete_at,
            )
        )
    with cluster.making() as make:
        layers = [make(cluster.layer(each.volume), each.volume.size_bytes) for each in wanted]
        volumes = [with_layer(each.volume, layer) for each, layer in zip(wanted, layers, strict=True)]
        with cluster.bytes_lock:
            cluster.commit([*snapshots, *volumes, *map(record_of, layers)])
    return snapshots


def create(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeSnapshot: of one volume."""
    asked = call.json
    volume = cluster.volume(call.arguments["volumeName"])
    wanted = Wanted(volume, asked.name or "", tagged({}, asked.tags), bool(asked.bind), _deletion(asked) or 0)
    (made,) = cut(cluster, [wanted])
    return ok(
        cluster,
        name=made.shown_name,
        autoName=made.name if made.automatic_name and made.name else None,
        snapshotGlobalId=made.global_id,
        snapshotVisibleVolumeId=made.number,
    )


def create_group(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumesGroupSnapshot: of several volumes at one instant."""
    asked = call.json
    if not 1 <= len(asked.volumes) <= MAX_GROUP:
        raise invalid(f"Between 1 and {MAX_GROUP} volumes.")
    wanted = [
        Wanted(cluster.volume(each.volume), each.name or "", tagged({}, asked.tags, each.tags))
        for each in asked.volumes
    ]
    return {
        "snapshots": [
            {
                "volume": each.volume.shown_name,
                "volumeGlobalId": each.volume.global_id,
                "snapshot": made.shown_name,
                "snapshotGlobalId": made.global_id,
                "remoteId": made.global_id,
            }
            for each, made in zip(wanted, cut(cluster, wanted), strict=True)
        ]
    }


def update(cluster: Cluster, call: Call) -> dict[str, Any]:
    """SnapshotUpdate: name, policy, tags, when it is to be deleted."""
    asked = call.json
    item = cluster.snapshot(call.arguments["snapshotName"])
    policy = template_named(cluster, asked.template).policy if asked.template else item.policy
    deletion = _deletion(asked)
    new = replace(
        item,
        policy=complete(cluster, changed(policy, asked)),
        tags=tagged(item.tags, asked.tags),
        bound=item.bound if asked.bind is None else asked.bind,
        delete_at=item.delete_at if deletion is None else deletion,
    )
    if asked.rename and asked.rename != item.name:
        cluster.require_free(asked.rename)
        new = replace(new, name=asked.rename, automatic_name=False)
    cluster.commit([new])
    cluster.show_devices()
    return ok(cluster)


def delete(cluster: Cluster, call: Call) -> dict[str, Any]:
    """SnapshotDelete: refused while attached. It stays listed as deleted as long as several volumes are upon it."""
    name = call.arguments.get("snapshotName") or f"~{call.arguments['globalVolumeId']}"
    item = cluster.snapshot(name)
    cluster.require_detached(item)
    cluster.commit([replace(item, deleted_at=time.time())])
    return ok(cluster)


def _automatic_name(volume: Item, number: int) -> str:
    """testvolume@1430. Source: StorPool's CLI reference. What is upon unnamed volumes has but a global id."""
    name = f"{volume.name}@{number}"
    return name if volume.name and _SNAPSHOT_NAME.fullmatch(name) and len(name) < sptypes.VOLUME_NAME_SIZE else ""


def _deletion(asked: Any) -> int | None:
    """When a snapshot is to be deleted; 0 for never, None when nothing is said. Raises Refused(invalidParam)."""
    if asked.deleteAfter is not None:
        return int(time.time()) + asked.deleteAfter if asked.deleteAfter else 0
    if asked.targetDeleteDate and asked.targetDeleteDate < time.time():
        raise invalid("targetDeleteDate is in the past.")
    date: int | None = asked.targetDeleteDate
    return date


CALLS = {
    "snapshotCreate": create,
    "snapshotCreateGroup": create_group,
    "snapshotUpdate": update,
    "snapshotDelete": delete,
    "snapshotDeleteById": delete,
}
