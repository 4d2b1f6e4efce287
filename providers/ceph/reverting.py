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
from dataclasses import dataclass, field
from typing import Any

import rados
import rbd
import structlog

from providers.base import CapabilityMissing, Extent, ReportProgress, SnapshotNotFound, VolumeInUse
from providers.ceph import changes
from providers.ceph.changes import OpenData, View
from providers.ceph.cluster import Cluster
from providers.ceph.cutting import SNAPSHOT
from providers.ceph.images import (
    HIDDEN,
    RETIRED,
    current_id,
    lock_for_us,
    opened,
    opened_member,
    users,
)
from providers.ceph.store import Manifest, StoredMember
from providers.extents import clipped

log = structlog.get_logger()

_PROBES = 64
_LOOK_EVERY_S = 0.25
_FEATURES = (
    rbd.RBD_FEATURE_LAYERING
    | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
    | rbd.RBD_FEATURE_OBJECT_MAP
    | rbd.RBD_FEATURE_FAST_DIFF
    | rbd.RBD_FEATURE_DEEP_FLATTEN
)


@dataclass
class Held:
    """A volume that is being reverted: its image, open and locked, and where it differs from the snapshot."""

    volume: str
    image: Any
    windows: list[Extent] = field(default_factory=list)

    def close(self) -> None:
        """Give the lock back."""
        self.image.close()


def hold(context: Any, volume: str, own_id: int) -> Held | None:
    """Open and lock a volume so that nobody writes to it; None when it is lost. Raises VolumeInUse."""
    if current_id(context, volume) is None:
        return None
    image = rbd.Image(context, volume)
    held = Held(volume, image)
    try:
        relock(held, own_id)
    except BaseException:
        image.close()
        raise
    return held


def relock(held: Held, own_id: int) -> None:
    """Take the lock (again), unless somebody has opened the volume meanwhile. Raises VolumeInUse."""
    busy = users(held.image, own_id)
    if busy:
        raise VolumeInUse(
            f"volume {held.volume} is in use by {', '.join(busy)}; stop it first",
            volume=held.volume,
            users=", ".join(busy),
        )
    lock_for_us(held.image, held.volume, own_id)


def unlock(held: Held) -> None:
    """Give the lock back for a moment: the safety snapshot's cut needs it."""
    if held.image.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK and held.image.is_exclusive_lock_owner():
        held.image.lock_release()


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
            make_alike(cluster, context, snapshot, volume)


def make_alike(cluster: Cluster, context: Any, image: Any, name: str) -> None:
    """Make an empty image with the size, object size and features of another."""
    unit, count = image.stripe_unit(), image.stripe_count()
    order = image.stat()["order"]
    striping = {} if count == 1 and unit == 1 << order else {"stripe_unit": unit, "stripe_count": count}
    data_pool = _data_pool(cluster, image)
    rbd.RBD().create(
        context, name, image.size(), order, old_format=False, features=_features(image), data_pool=data_pool, **striping
    )


def clone(cluster: Cluster, context: Any, manifest: Manifest, member: StoredMember, name: str) -> None:
    """Make a copy-on-write clone of a member under a name. Raises CapabilityMissing, SnapshotNotFound."""
    if member.kind != "snapshot":
        raise CapabilityMissing(
            f"the snapshot of {member.volume} in {manifest.group} is an RBD group's, which this Ceph cannot clone: "
            'take snapshots with cut = "parallel" for that, or leave `instant` out',
            volume=member.volume,
            capability="instant_revert",
        )
    with opened_member(context, manifest, member.volume) as snapshot:
        try:
            parent = snapshot.get_name()
            rbd.RBD().clone(
                context,
                parent,
                manifest.rbd_name,
                context,
                name,
                features=_features(snapshot),
                order=snapshot.stat()["order"],
                data_pool=_data_pool(cluster, snapshot),
            )
        except rbd.ImageNotFound:
            raise SnapshotNotFound(
                f"the image of {member.volume} is in the trash: `rbd trash restore {member.image_id}` first",
                group=manifest.group,
                volume=member.volume,
            ) from None


def stage(cluster: Cluster, context: Any, manifest: Manifest, volumes: Sequence[str]) -> None:
    """Make the clones for a swap. Repeatable."""
    unstage(context, manifest)
    for volume in volumes:
        member = manifest.member(volume)
        clone(cluster, context, manifest, member, _staged(member))


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


def _features(image: Any) -> int:
    """Return the features that a new image can be made with: not those that a state of the image brings."""
    features: int = image.features() & _FEATURES
    return features


def _data_pool(cluster: Cluster, image: Any) -> str | None:
    """Return the name of the pool that has an image's objects, None when it is the image's own."""
    name = str(cluster.connection().pool_reverse_lookup(image.data_pool_id()))
    return None if name == cluster.rbd_pool else name
