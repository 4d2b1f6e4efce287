"""A group's members from their reservation to their removal.

reserve  looks at every volume, and removes what an earlier attempt under the same id has left
cut      one VolumesGroupSnapshot over all of them, called once; meanwhile the volumes are looked at again
members  what there is of a group, found by its tags
remove   all of it, from any state, as often as it takes

When the answer to the cut is lost, what it did is found by the reservation's tag: all snapshots are the cut, some of
them are removed. A cut that the cluster carries out after that, for a reservation nobody knows any more, is never
taken for another's, and removed (late.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog

from providers.base import (
    GroupSpec,
    InvalidName,
    Member,
    PoolUnavailable,
    ProviderError,
    SnapshotInUse,
    SnapshotNotFound,
    VolumeChanged,
    VolumeNotFound,
)
from providers.parallel import together
from providers.storpool import tags
from providers.storpool.cluster import Busy, Cluster, Missing
from providers.storpool.devices import Devices
from providers.storpool.late import LateCuts
from providers.storpool.objects import Found, Objects

log = structlog.get_logger()


@dataclass
class Reservation:
    """What prepare() has seen. `cut` is this reservation's word in the tags; `snapshots` are there once it was cut."""

    group: str
    names: tuple[str, ...]
    volumes: tuple[Found, ...]
    cut: str = field(default_factory=lambda: secrets.token_hex(8))
    snapshots: dict[str, str] | None = None

    def members(self) -> list[Member]:
        """Return the members, with handles once they were cut."""
        handles = self.snapshots or {}
        pairs = zip(self.names, self.volumes, strict=True)
        return [shown(name, volume.size_bytes, handles.get(volume.global_id, "")) for name, volume in pairs]


def shown(name: str, size_bytes: int, snapshot_id: str) -> Member:
    """Return a member as the interface has it; `snapshot_id` is "" before the cut."""
    return Member(name, size_bytes, "raw", "group", f"~{snapshot_id}" if snapshot_id else "", atomic=True)


def reserve(objects: Objects, spec: GroupSpec, executor: Executor) -> Reservation:
    """Look at the volumes. Raises VolumeNotFound, InvalidName (also for one volume under two names)."""
    names = [volume.name for volume in spec.volumes]
    found = together(executor, [partial(objects.volume, name) for name in names])
    seen: dict[str, str] = {}
    for name, volume in zip(names, found, strict=True):
        if volume.global_id in seen:
            raise InvalidName(f"{seen[volume.global_id]} and {name} are the same volume", volume=name)
        seen[volume.global_id] = name
    return Reservation(spec.group, tuple(names), tuple(found))


def cut(cluster: Cluster, objects: Objects, reservation: Reservation, executor: Executor, late: LateCuts) -> None:
    """Take the snapshots. On an error none is left, as far as the cluster answers.

    Nothing here is repeated or waited for longer than a call inside the window may take.
    Raises VolumeNotFound, VolumeChanged, PoolFull, PoolUnavailable.
    """
    count = len(reservation.volumes)
    request = {
        "volumes": [
            {
                "volume": volume.by_id,
                "tags": tags.of_member(
                    objects.scope, reservation.group, reservation.cut, number, count, name, volume.global_id
                ),
            }
            for number, (name, volume) in enumerate(zip(reservation.names, reservation.volumes, strict=True))
        ]
    }
    checks = [partial(_check_same, objects, volume) for volume in reservation.volumes]
    try:
        answer, *_ = together(executor, [partial(_snap, cluster, request), *checks])
        taken = answer if isinstance(answer, dict) else _taken(objects, reservation)
        if len(taken) != count:
            raise PoolUnavailable(  # noqa: TRY301 - what there is of it goes the same way
                f"the cut of {reservation.group} made {len(taken)} of {count} snapshots: {answer}"
            )
    except BaseException as error:
        _remove_attempt(cluster, objects, reservation)
        late.expect(reservation.group, reservation.cut)
        if isinstance(error, Missing):
            raise _lost_volume(objects, reservation) from error
        raise
    reservation.snapshots = taken


def _snap(cluster: Cluster, request: dict[str, Any]) -> dict[str, str] | PoolUnavailable:
    """Return the snapshots' global ids by those of their volumes, or the error after which nobody knows how it went."""
    wanted = {volume["volume"].removeprefix("~") for volume in request["volumes"]}
    try:
        answer = cluster.call_in_window("snapshotCreateGroup", request)
    except Missing:
        raise
    except PoolUnavailable as error:
        log.warning("looking for what the cut did", error=str(error))
        return error
    taken = {str(one.volumeGlobalId): str(one.snapshotGlobalId) for one in answer.snapshots if one.snapshotGlobalId}
    if taken.keys() == wanted:
        return taken
    return PoolUnavailable(f"the StorPool API names {len(taken)} of {len(wanted)} snapshots in its answer")


def _check_same(objects: Objects, volume: Found) -> None:
    if objects.any_volume(volume.by_id, in_window=True).size_bytes != volume.size_bytes:
        raise VolumeChanged(f"volume {volume.name} was resized since it was prepared", volume=volume.name)


def _taken(objects: Objects, reservation: Reservation) -> dict[str, str]:
    made = objects.members(reservation.group, in_window=True)
    return {one.tags.get(tags.OF, ""): one.global_id for one in made if one.tags.get(tags.CUT) == reservation.cut}


def _remove_attempt(cluster: Cluster, objects: Objects, reservation: Reservation) -> None:
    """Remove what a failed cut left; what cannot be removed now the gateway has removed by abort()."""
    try:
        for snapshot_id in _taken(objects, reservation).values():
            cluster.call_in_window("snapshotDelete", f"~{snapshot_id}")
    except ProviderError as error:
        log.warning("a failed cut may have left snapshots", group=reservation.group, error=str(error))


def _lost_volume(objects: Objects, reservation: Reservation) -> ProviderError:
    """Return why a volume that was reserved is not there: gone, or another has its name now."""
    for name, volume in zip(reservation.names, reservation.volumes, strict=True):
        try:
            objects.any_volume(volume.by_id)
        except Missing:
            try:
                objects.any_volume(name)
            except Missing:
                return VolumeNotFound(f"volume {name} is gone since it was prepared", volume=name)
            return VolumeChanged(f"volume {name} was replaced by another since it was prepared", volume=name)
    return PoolUnavailable(f"the cluster did not find a volume of {reservation.group} that is there")


def whole(group: str, members: Sequence[Found], cut: str | None) -> list[Found]:
    """Return the members of one cut of a group, in their order. Raises SnapshotNotFound when some are missing.

    Where nobody knows which cut it was (None) there has to be one only: of two, as one that was carried out late would
    leave, none is guessed.
    """
    chosen = [member for member in members if cut in (None, member.tags.get(tags.CUT))]
    cuts = {member.tags.get(tags.CUT) for member in chosen}
    by_number = {tags.number_in(member.tags): member for member in chosen}
    count = max((count for _, count in by_number), default=0)
    places = [(number, count) for number in range(count)]
    if not places or len(cuts) != 1 or sorted(by_number) != places:
        raise SnapshotNotFound(f"the storage has {len(chosen)} of {count} members of {group}", group=group)
    return [by_number[place] for place in places]


def remove(objects: Objects, devices: Devices, cluster: Cluster, snapshots: Sequence[Found]) -> None:
    """Delete snapshots, detached from this host first. Raises SnapshotInUse, PoolUnavailable."""
    if not snapshots:
        return
    devices.sweep(list(snapshots))
    for snapshot in snapshots:
        try:
            cluster.call("snapshotDelete", snapshot.by_id)
        except Missing:
            continue  # a repeat
        except Busy as error:
            raise in_use(objects, devices, [snapshot], str(error)) from error


def check_removable(objects: Objects, devices: Devices, snapshots: Sequence[Found]) -> None:
    """Raise SnapshotInUse when a snapshot is attached to another host."""
    ours = devices.client()
    if any(attachment.client != ours for _, attachment in objects.attachments_of(snapshots)):
        raise in_use(objects, devices, snapshots, "it is attached")


def in_use(objects: Objects, devices: Devices, snapshots: Sequence[Found], why: str) -> SnapshotInUse:
    """Return the error that names what needs a snapshot: clients that have it attached, volumes based on it."""
    ours = devices.client()
    attached = [(found, one) for found, one in objects.attachments_of(snapshots) if one.client != ours]
    users = sorted({one.user for _, one in attached})
    chosen = attached[0][0] if attached else snapshots[0]
    children = objects.children([chosen])
    needed = ", ".join(users or children) or "something in the cluster"
    return SnapshotInUse(
        f"the snapshot {chosen.by_id} of {tags.volume_in(chosen.tags)} is needed by {needed} ({why})",
        group=chosen.tags.get(tags.GROUP, ""),
        volume=tags.volume_in(chosen.tags),
        users=", ".join(users),
        clones=",".join(children),
    )
