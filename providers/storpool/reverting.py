"""Setting volumes back to a group's members, by VolumeRevert: at once for any size, and never of a volume attached.

A volume that a client has attached is refused, with the client's number, before any volume is touched. Where the pool
has force_detach they are detached instead, all in one call, and attached again as they were at the end; what was
detached is written into the group's record first, so that a revert that goes on after a crash knows it too.

A revert that died half way is begun again for all its volumes: reverting one twice changes nothing more. It waits for
a volume that a client has attached meanwhile, rather than leave a VM with disks of two times.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from providers.base import InvalidName, ReportProgress, SnapshotNotFound, VolumeInUse, VolumeNotFound
from providers.storpool import tags
from providers.storpool.cluster import Busy, Cluster, Exists, Missing
from providers.storpool.objects import Attachment, Found, Objects
from providers.storpool.store import Content, Detached, Store

log = structlog.get_logger()


def chosen(group: str, members: Sequence[Found], volumes: Sequence[str]) -> dict[str, Found]:
    """Return the members' snapshots by the names of their volumes. Raises SnapshotNotFound."""
    by_name = {tags.volume_in(member.tags): member for member in members}
    for volume in volumes:
        if volume not in by_name:
            raise SnapshotNotFound(f"the storage has no snapshot of {volume} in {group}", group=group, volume=volume)
    return {volume: by_name[volume] for volume in volumes}


def present(objects: Objects, volumes: Sequence[str]) -> dict[str, Found | None]:
    """Return the volumes as they are now; None for one that is lost, which a revert brings back."""
    found: dict[str, Found | None] = {}
    for volume in volumes:
        try:
            found[volume] = objects.volume(volume)
        except VolumeNotFound:
            found[volume] = None
    return found


def check_detached(objects: Objects, volumes: dict[str, Found | None]) -> None:
    """Raise VolumeInUse, naming every client, when one of the volumes is attached."""
    names = {found.global_id: name for name, found in volumes.items() if found}
    attached = objects.attachments_of(found for found in volumes.values() if found)
    if attached:
        raise in_use(names[attached[0][0].global_id], [one for found, one in attached if found == attached[0][0]])


def in_use(volume: str, attachments: Sequence[Attachment]) -> VolumeInUse:
    """Return the error for a volume that has to be detached first."""
    users = ", ".join(one.user for one in attachments) or "a client that is just going"
    return VolumeInUse(
        f"volume {volume} is attached to {users}: stop its VM and detach it, or let the pool do so (force_detach)",
        volume=volume,
        users=users,
    )


def set_back(
    cluster: Cluster, objects: Objects, snapshots: dict[str, Found], progress: ReportProgress
) -> dict[str, str]:
    """Revert every volume to its member's snapshot; a lost one is made again from it.

    Returns the new global ids of those that were made, by the old ones. Raises VolumeInUse, PoolFull, PoolUnavailable.
    """
    total = sum(snapshot.size_bytes for snapshot in snapshots.values())
    done, made = 0, {}
    for volume, snapshot in snapshots.items():
        progress(done, total)
        try:
            found = objects.volume(volume)
            cluster.call("volumeRevert", found.by_id, {"toSnapshot": snapshot.by_id})
            _resize(cluster, objects.volume(volume), snapshot.size_bytes)
        except (VolumeNotFound, Missing):
            made[snapshot.tags[tags.OF]] = bring_back(objects, volume, snapshot).global_id
        except Busy:
            raise in_use(volume, [one for _, one in objects.attachments_of([found])]) from None
        done += snapshot.size_bytes
    progress(total, total)
    return made


def _resize(cluster: Cluster, found: Found, size_bytes: int) -> None:
    """Give a volume the size that it had: whether VolumeRevert does so is not documented."""
    if found.size_bytes != size_bytes:
        cluster.call("volumeUpdate", found.by_id, {"size": size_bytes, "shrinkOk": True})


def bring_back(objects: Objects, volume: str, snapshot: Found) -> Found:
    """Make a lost volume again, under its name, from its snapshot. Raises VolumeInUse when something else has the name.

    Its global id is another than before: one that is only known by its global id cannot come back under it.
    """
    if volume.startswith("~"):
        raise SnapshotNotFound(
            f"volume {volume} is gone, and a volume without a name cannot come back under its global id: clone the "
            "snapshot instead",
            volume=volume,
        )
    try:
        objects.created(volume, {}, parent=snapshot.by_id)
    except Exists as error:
        raise VolumeInUse(f"{volume} is not in this pool any more, but its name is in use", volume=volume) from error
    return objects.volume(volume)


def detach_all(cluster: Cluster, objects: Objects, store: Store, group: str, volumes: dict[str, Found | None]) -> None:
    """Detach the volumes from every client, by force, after it was written down. Repeatable."""
    attached = objects.attachments_of(found for found in volumes.values() if found)
    if not attached:
        return
    record = store.settled(group)
    content = store.read(record)
    known = dict.fromkeys(content.detached)
    for found, one in attached:
        known[Detached(volume_id=found.global_id, client=one.client, rights=one.rights)] = None
    store.write(record, Content(content.record, tuple(known)))
    detached = {found.global_id: found for found, _ in attached}.values()
    changes = [{"volume": found.by_id, "detach": "all", "force": True} for found in detached]
    cluster.call("volumesReassignWait", {"reassign": changes})


def attach_again(cluster: Cluster, store: Store, group: str, made: dict[str, str]) -> None:
    """Attach again what this revert has detached, and forget it. Repeatable. Raises PoolUnavailable.

    The volumes are reverted by then: a client that the cluster does not know any more is said in the log, and does not
    hold up the others.
    """
    record = store.settled(group)
    content = store.read(record)
    if not content.detached:
        return
    for one in content.detached:
        change = {"volume": f"~{made.get(one.volume_id, one.volume_id)}", one.rights: [one.client]}
        try:
            cluster.call("volumesReassignWait", {"reassign": [change], "attachTimeout": 0})
        except (InvalidName, Missing) as error:
            log.warning("could not be attached again", group=group, **one.model_dump(), error=str(error))
    store.write(record, Content(content.record))
