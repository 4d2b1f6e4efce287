"""A group snapshot from its reservation to its removal.

reserve  looks at every image and makes the RBD group of them; nothing of it goes into the OSD map, whose changes
         the monitors let wait for one another (paxos_propose_interval)
cut      one RBD group snapshot, which stops every writer by the images' exclusive locks; an image that somebody
         else's group holds gets a snapshot of its own at the same time
settle   the images leave the RBD group, which keeps its snapshot, and the manifest is finished
remove   all of it, from any state, as often as it takes

Sources: librbd/api/Group.cc (snap_create, group_snap_remove_by_record), `rbd help group snap create`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, Literal

import rados
import rbd

from providers.base import GroupSpec, ReportProgress, SnapshotInUse, VolumeChanged, VolumeNotFound
from providers.ceph import store
from providers.ceph.cluster import read_omap
from providers.ceph.images import RETIRED, opened, opened_by_id
from providers.ceph.store import Manifest, StoredMember
from providers.parallel import together

SNAPSHOT = "cut"
"""Name of the one snapshot of the RBD group."""

_OURS_LEAVE_WITHIN_S = 1.0
_BUSY_AT_MOST_S = 5.0
_COMPLETE = 1
_DIRECTORY = "rbd_group_directory"


def reserve(context: Any, spec: GroupSpec, cut_by: Literal["group", "parallel"], executor: Executor) -> Manifest:
    """Look at the images, make the RBD group, write the reservation.

    What this leaves when it raises (VolumeNotFound, InvalidName, Ceph's errors) remove() takes away.
    """
    names = [volume.name for volume in spec.volumes]
    members = together(executor, [partial(_looked_at, context, name, cut_by) for name in names])
    manifest = Manifest(group=spec.group, state="reserved", members=members)
    store.reserve(context, manifest)
    if manifest.in_group():
        rbd.RBD().group_create(context, manifest.rbd_name)
        manifest.rbd_group_id = _rbd_group_id(context, manifest.rbd_name)
        group = rbd.Group(context, manifest.rbd_name)
        for member in manifest.in_group():
            try:
                group.add_image(context, member.volume)
            except rbd.ObjectExists:  # somebody was quicker
                member.kind = "snapshot"
            except rbd.ObjectNotFound:
                raise VolumeNotFound(f"there is no image {member.volume}", volume=member.volume) from None
        store.write(context, manifest)
    return manifest


def _looked_at(context: Any, name: str, cut_by: Literal["group", "parallel"]) -> StoredMember:
    with opened(context, name) as image:
        member = StoredMember(volume=name, image_id=image.id(), size_bytes=image.size(), kind="snapshot")
    if cut_by == "group" and not _is_held(context, name):
        member.kind = "group"
    return member


def _is_held(context: Any, name: str) -> bool:
    """Tell whether an RBD group has the image; one of ours is about to let it go."""
    deadline = time.monotonic() + _OURS_LEAVE_WITHIN_S
    while True:
        with opened(context, name) as image:
            holder = image.group()["name"]
        if not holder or not holder.startswith(store.RBD_GROUP_PREFIX) or time.monotonic() > deadline:
            return bool(holder)
        time.sleep(0.05)


def _rbd_group_id(context: Any, name: str) -> str:
    """Return Ceph's id of a group: the value of its entry is a string after its length (Ceph encoding)."""
    value = read_omap(context, _DIRECTORY, f"name_{name}") or bytes(4)
    return value[4:].decode()


def cut(context: Any, manifest: Manifest, executor: Executor) -> None:
    """Take the snapshots, all at once, looking meanwhile whether the images are those that were reserved.

    Raises VolumeNotFound, VolumeChanged, Ceph's errors; remove() then takes away what there is.
    """
    work: list[Callable[[], None]] = [partial(_check_same, context, member) for member in manifest.members]
    work += [partial(_snap, context, manifest, member) for member in manifest.alone()]
    if manifest.in_group():
        work.append(partial(_snap_group, context, manifest))
    together(executor, work)


def _snap_group(context: Any, manifest: Manifest) -> None:
    group = rbd.Group(context, manifest.rbd_name)
    if _is_cut(group):
        return
    there = {found["name"] for found in group.list_images()}
    for member in manifest.in_group():
        if member.volume not in there:
            raise VolumeNotFound(
                f"image {member.volume} has left the RBD group {manifest.rbd_name} or is gone since it was prepared",
                volume=member.volume,
            )
    _when_free(partial(group.create_snap, SNAPSHOT))


def _is_cut(group: Any) -> bool:
    return any(found["state"] == _COMPLETE for found in group.list_snaps())


def _snap(context: Any, manifest: Manifest, member: StoredMember) -> None:
    try:
        with opened_by_id(context, member.image_id, writing=True) as image, suppress(rbd.ImageExists):
            _when_free(partial(image.create_snap, manifest.rbd_name))
    except rbd.ImageNotFound:
        raise VolumeNotFound(f"image {member.volume} is gone since it was prepared", volume=member.volume) from None


def _when_free(snap: Callable[[], None]) -> None:
    """Take a snapshot, again while another group snapshot of the image is being taken.

    That one keeps the image's lock to itself (EBUSY), or gives it up while it is asked (EINVAL).
    """
    deadline = time.monotonic() + _BUSY_AT_MOST_S
    while True:
        try:
            snap()
        except (rbd.ImageBusy, rbd.InvalidArgument):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _check_same(context: Any, member: StoredMember) -> None:
    with opened(context, member.volume) as image:
        if image.id() != member.image_id:
            raise VolumeChanged(
                f"volume {member.volume} was replaced by another image since it was prepared", volume=member.volume
            )
        if image.size() != member.size_bytes:
            raise VolumeChanged(f"volume {member.volume} was resized since it was prepared", volume=member.volume)


def settle(context: Any, manifest: Manifest, cut_time: datetime, record: str, executor: Executor) -> Manifest:
    """Find the snapshots, let the images go, and finish the manifest; repeatable.

    Raises VolumeChanged when a snapshot did not come to be.
    """
    together(executor, [partial(_find, context, manifest, member) for member in manifest.members])
    _let_go(context, manifest)
    finished = manifest.model_copy(update={"state": "settled", "cut_time": cut_time, "record": record})
    store.write(context, finished)
    return finished


def _find(context: Any, manifest: Manifest, member: StoredMember) -> None:
    with suppress(rbd.ImageNotFound), opened_by_id(context, member.image_id) as image:
        for snapshot in image.list_snaps():
            if _is_ours(manifest, member, snapshot):
                member.snap_id, member.size_bytes = snapshot["id"], snapshot["size"]
                return
    raise VolumeChanged(f"the cut of {manifest.group} did not survive: {member.volume}", volume=member.volume)


def _is_ours(manifest: Manifest, member: StoredMember, snapshot: dict[str, Any]) -> bool:
    if member.kind == "snapshot":
        return bool(snapshot["name"] == manifest.rbd_name)
    # ".group.<pool>_<group id>_<snapshot id>", as librbd's calc_ind_image_snap_name has it
    is_group = snapshot["namespace"] == rbd.RBD_SNAP_NAMESPACE_TYPE_GROUP
    return bool(is_group and f"_{manifest.rbd_group_id}_" in snapshot["name"])


def _let_go(context: Any, manifest: Manifest) -> None:
    """Take the images out of the RBD group; it keeps its snapshot."""
    if not manifest.in_group():
        return
    group = rbd.Group(context, manifest.rbd_name)
    with suppress(rbd.ObjectNotFound):
        for found in list(group.list_images()):
            with suppress(rbd.ObjectNotFound):
                group.remove_image(context, found["name"])


def exists(context: Any, manifest: Manifest) -> bool:
    """Tell whether the cluster still has every snapshot of a settled group."""
    if manifest.in_group():
        try:
            if not _is_cut(rbd.Group(context, manifest.rbd_name)):
                return False
        except rbd.ObjectNotFound:
            return False
    for member in manifest.alone():
        try:
            with opened_by_id(context, member.image_id) as image:
                if all(found["id"] != member.snap_id for found in image.list_snaps()):
                    return False
        except rbd.ImageNotFound:
            return False
    return True


def check_removable(context: Any, manifest: Manifest) -> None:
    """Raise SnapshotInUse when a snapshot has clones or is protected."""
    for member in manifest.members:
        with suppress(rbd.ImageNotFound), opened_by_id(context, member.image_id) as image:
            image.set_snap_by_id(member.snap_id)
            children = [f"{child['pool']}/{child['image']}" for child in image.list_children2() if not child["trash"]]
            if children:
                raise SnapshotInUse(
                    f"the snapshot of {member.volume} has clones that need it: {', '.join(children)}; "
                    "flatten (`rbd flatten`) or remove them first"
                    + (
                        f" ({RETIRED}* is what an instant revert replaced: it goes with the snapshots taken of it)"
                        if any(f"/{RETIRED}" in child for child in children)
                        else ""
                    ),
                    group=manifest.group,
                    volume=member.volume,
                    clones=",".join(children),
                )
            if member.kind == "snapshot" and image.is_protected_snap(manifest.rbd_name):
                raise SnapshotInUse(
                    f"the snapshot of {member.volume} is protected: `rbd snap unprotect` it first",
                    group=manifest.group,
                    volume=member.volume,
                )


def remove(context: Any, manifest: Manifest, progress: ReportProgress) -> None:
    """Remove the snapshots, the RBD group, what a revert retired and nobody needs any more, and the manifest."""
    total = sum(member.size_bytes for member in manifest.members)
    progress(0, total)
    _remove_rbd_group(context, manifest)
    done = 0
    for member in manifest.members:
        with suppress(rbd.ImageNotFound):
            _remove_snapshots(context, manifest, member)
            _remove_retired(context, member)
        done += member.size_bytes
        progress(done, total)
    store.remove(context, manifest.group)


def _remove_rbd_group(context: Any, manifest: Manifest) -> None:
    try:
        group = rbd.Group(context, manifest.rbd_name)
        for found in list(group.list_snaps()):
            with suppress(rbd.ObjectNotFound):
                group.remove_snap(found["name"])
        _let_go(context, manifest)
        rbd.RBD().group_remove(context, manifest.rbd_name)
    except (rbd.ObjectNotFound, rados.ObjectNotFound):
        return


def _remove_snapshots(context: Any, manifest: Manifest, member: StoredMember) -> None:
    """Remove a member's snapshots; those of an RBD group too that the group no longer knows, as an outage leaves."""
    with opened_by_id(context, member.image_id) as image:
        left = [found["id"] for found in image.list_snaps() if _is_ours(manifest, member, found)]
    if left:
        with opened_by_id(context, member.image_id, writing=True) as image:
            for snap_id in left:
                with suppress(rbd.ImageNotFound):
                    image.remove_snap_by_id(snap_id)


def _remove_retired(context: Any, member: StoredMember) -> None:
    """Remove an image that a revert has replaced, with its last snapshot."""
    with opened_by_id(context, member.image_id) as image:
        name = image.get_name()
        if not name.startswith(RETIRED) or any(True for _ in image.list_snaps()):
            return
    with suppress(rbd.ImageHasSnapshots, rbd.ImageBusy):  # a snapshot in the trash, for a clone that was not flattened
        rbd.RBD().remove(context, name)
