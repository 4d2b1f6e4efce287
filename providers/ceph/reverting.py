"""Setting images back to a snapshot, in one of two ways.

in place  librbd rolls back: the whole RBD group snapshot, which still works after the images have left the group, or
          an image's own snapshot. Some members of a group, which librbd cannot, get back what differs, object by
          object. The image, its id and its snapshots stay; a repeat after a crash starts over and changes nothing more.
swap      a clone of the snapshot takes the image's name, in a time that does not depend on the size. The image that
          was there goes on under a hidden name, because its snapshots, the clone's parent among them, live in it; it
          is removed with the last of them. Needs snapshots that this Ceph can clone: those of cut = "parallel".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from typing import Any

import rados
import rbd
import structlog

from providers.base import ReportProgress
from providers.ceph import changes, cloning
from providers.ceph.changes import OpenData, View
from providers.ceph.cluster import Cluster
from providers.ceph.cutting import SNAPSHOT
from providers.ceph.holding import Held, unlock
from providers.ceph.images import HIDDEN, RETIRED, current_id, opened, opened_member
from providers.ceph.store import Manifest, StoredMember
from providers.extents import clipped

log = structlog.get_logger()

_PROBES = 64
_LOOK_EVERY_S = 0.25


def find_windows(
    context: Any, manifest: Manifest, held: Sequence[Held], open_data: OpenData, executor: Executor
) -> int:
    """Find where the volumes differ from the snapshot; return how many bytes that is, by objects."""
    for one in held:
        with opened_member(context, manifest, one.volume) as snapshot:
            member = manifest.member(one.volume)
            found = changes.windows(View(one.image, None), View(snapshot, member.snap_id), open_data, executor)
            one.windows = list(found)
    return sum(window.length for one in held for window in one.windows)


def set_back(
    context: Any,
    manifest: Manifest,
    held: Sequence[Held],
    progress: ReportProgress,
    open_data: OpenData,
    executor: Executor,
) -> None:
    """Roll back. Repeatable after a crash, from find_windows() on.

    By librbd where it can: snapshots of images on their own, and an RBD group's when all of its images are reverted
    and are still those that were cut. Else what differs is written back.
    """
    total = sum(window.length for one in held for window in one.windows)
    progress(0, total)
    own = [one for one in held if _is_same(manifest, one)]
    grouped = [one for one in own if manifest.member(one.volume).kind == "group"]
    if grouped and len(grouped) == len(manifest.in_group()):
        for one in grouped:
            unlock(one)  # librbd takes the locks itself, in handles of its own
        group = rbd.Group(context, manifest.rbd_name)
        roll = executor.submit(group.rollback_to_snap, SNAPSHOT)
        done = _watched(roll, grouped, 0, total, progress, open_data)
    else:
        grouped, done = [], 0
    progress(done, total)
    for one in held:
        if one in grouped:
            continue
        if one in own and manifest.member(one.volume).kind == "snapshot":
            roll = executor.submit(one.image.rollback_to_snap, manifest.rbd_name)
            done += _watched(roll, [one], done, total, progress, open_data)
            progress(done, total)
        else:
            for length in _written_back(context, manifest, one, executor):
                done += length
                progress(min(done, total), total)
    progress(total, total)


def _watched(
    roll: Future[None], held: Sequence[Held], done: int, total: int, progress: ReportProgress, open_data: OpenData
) -> int:
    """Wait for librbd's rollback, which does not tell how far it is: look at some of the objects meanwhile.

    Returns how many bytes that was, by objects.
    """
    length = sum(window.length for one in held for window in one.windows)
    share = max(1, _PROBES // len(held))
    try:
        probes = [changes.Probe(one.image, one.windows, share, open_data) for one in held]
        objects = sum(probe.objects for probe in probes)
        while objects and not wait([roll], timeout=_LOOK_EVERY_S).done:
            try:
                progress(done + length * sum(probe.changed() for probe in probes) // objects, total)
            except rados.Error as error:  # of the progress only: the rollback itself waits for the cluster
                log.info("how far the rollback is cannot be seen", error=str(error))
    finally:
        wait([roll])
    roll.result()
    return length


def _is_same(manifest: Manifest, held: Held) -> bool:
    """Tell whether the volume is still the image that was cut, not one that a swap or a copy has put there."""
    return bool(held.image.id() == manifest.member(held.volume).image_id)


def _written_back(context: Any, manifest: Manifest, held: Held, executor: Executor) -> Iterator[int]:
    """Write back what differs; yield bytes done now and then."""
    member = manifest.member(held.volume)
    if held.image.size() != member.size_bytes:
        held.image.resize(member.size_bytes)
    windows = list(clipped(held.windows, member.size_bytes))
    with opened_member(context, manifest, held.volume) as snapshot:
        yield from changes.set_equal(View(snapshot, member.snap_id), held.image, windows, executor)


def bring_back(cluster: Cluster, context: Any, manifest: Manifest, volume: str) -> None:
    """Give a lost volume its name again: the image from the trash, or a new empty one when its image lives elsewhere.

    Raises SnapshotNotFound.
    """
    member = manifest.member(volume)
    try:
        rbd.RBD().trash_restore(context, member.image_id, volume)
    except (rbd.ImageNotFound, rbd.InvalidArgument):
        with opened_member(context, manifest, volume) as snapshot:
            cloning.make_alike(cluster, context, snapshot, volume)


def stage(cluster: Cluster, context: Any, manifest: Manifest, volumes: Sequence[str]) -> None:
    """Make the clones for a swap. Repeatable."""
    unstage(context, manifest)
    for volume in volumes:
        member = manifest.member(volume)
        cloning.clone(cluster, context, manifest, member, _staged(member))


def is_staged(context: Any, manifest: Manifest, volumes: Sequence[str]) -> bool:
    """Tell whether a swap of these volumes has begun and not ended."""
    return any(_id_of_hidden(context, _staged(manifest.member(volume))) for volume in volumes)


def unstage(context: Any, manifest: Manifest) -> None:
    """Remove what stage() made. Repeatable."""
    for member in manifest.members:
        with suppress(rbd.ImageNotFound):
            rbd.RBD().remove(context, _staged(member))


def swap(context: Any, manifest: Manifest, volume: str) -> None:
    """Give the clone the volume's name. Repeatable: the clone's own name goes last."""
    staged = _staged(manifest.member(volume))
    if _id_of_hidden(context, staged) is None:
        return
    if (replaced := current_id(context, volume)) is not None:
        with opened(context, volume, writing=True) as image:
            image.metadata_set("frostgate.volume", volume)
        rbd.RBD().rename(context, volume, RETIRED + replaced)
    rbd.RBD().rename(context, staged, volume)


def _staged(member: StoredMember) -> str:
    return f"{HIDDEN}swap.{member.image_id}.{member.snap_id}"


def _id_of_hidden(context: Any, name: str) -> str | None:
    try:
        image = rbd.Image(context, name, read_only=True)
    except rbd.ImageNotFound:
        return None
    try:
        return str(image.id())
    finally:
        image.close()
