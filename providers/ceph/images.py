"""RBD images: opening them, who uses them, what they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rbd

from providers.base import InvalidName, PoolUnavailable, SnapshotNotFound, Volume, VolumeNotFound
from providers.ceph.store import Manifest

HIDDEN = ".frostgate."
"""Images of ours that are no volumes begin so: clones being made, and images that a revert has replaced."""

RETIRED = HIDDEN + "retired."


def check_name(name: str) -> None:
    """Raise InvalidName for what cannot be an image that is a volume."""
    if "@" in name or "/" in name or name.startswith("."):
        raise InvalidName(f"volume {name!r} has '@' or '/', or a leading '.'", volume=name)


@contextmanager
def opened(context: Any, name: str, *, writing: bool = False) -> Iterator[Any]:
    """Yield an image by its name. Raises VolumeNotFound."""
    check_name(name)
    try:
        image = rbd.Image(context, name, read_only=not writing)
    except rbd.ImageNotFound:
        raise VolumeNotFound(f"there is no image {name}", volume=name) from None
    try:
        yield image
    finally:
        image.close()


@contextmanager
def opened_hidden(context: Any, name: str) -> Iterator[Any]:
    """Yield an image of ours for writing. Raises rbd.ImageNotFound."""
    image = rbd.Image(context, name)
    try:
        yield image
    finally:
        image.close()


@contextmanager
def opened_by_id(context: Any, image_id: str, *, writing: bool = False) -> Iterator[Any]:
    """Yield an image by its id, whatever its name is now, in the trash too. Raises rbd.ImageNotFound."""
    image = rbd.Image(context, image_id=image_id, read_only=not writing)
    try:
        yield image
    finally:
        image.close()


def open_member(context: Any, manifest: Manifest, volume: str) -> Any:
    """Return the image of a member, set to its snapshot; the caller closes it. Raises SnapshotNotFound."""
    member = manifest.member(volume)
    lost = SnapshotNotFound(
        f"the snapshot of {volume} in {manifest.group} is missing", group=manifest.group, volume=volume
    )
    try:
        image = rbd.Image(context, image_id=member.image_id, read_only=True)
    except rbd.ImageNotFound:
        raise lost from None
    try:
        image.set_snap_by_id(member.snap_id)
    except rbd.ImageNotFound:
        image.close()
        raise lost from None
    return image


@contextmanager
def opened_member(context: Any, manifest: Manifest, volume: str) -> Iterator[Any]:
    """Yield the image of a member, set to its snapshot. Raises SnapshotNotFound."""
    image = open_member(context, manifest, volume)
    try:
        yield image
    finally:
        image.close()


def current_id(context: Any, name: str) -> str | None:
    """Return the id of the image that has a name now, or None."""
    try:
        with opened(context, name) as image:
            return str(image.id())
    except VolumeNotFound:
        return None


def users(image: Any, own_id: int) -> tuple[str, ...]:
    """Say who has an image open for writing, but for ourselves: its watchers. Read-only clients do not watch."""
    return tuple(
        sorted(f"client.{found['id']} at {found['addr']}" for found in image.watchers_list() if found["id"] != own_id)
    )


def volume_of(context: Any, name: str, own_id: int) -> Volume:
    """Return an image as a volume. Raises VolumeNotFound."""
    with opened(context, name) as image:
        size = int(image.size())
        busy = users(image, own_id)
        return Volume(name, size, _allocated_bytes(image, size), "raw", bool(busy), busy)


def lock_for_us(image: Any, volume: str, own_id: int) -> None:
    """Take an image's exclusive lock, so that nobody else can write; images without that feature have none.

    The caller has seen that there are no users. The lock ends with the image's close().
    """
    if image.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK:
        try:
            image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
        except (rbd.ReadOnlyImage, rbd.ImageBusy) as error:
            raise PoolUnavailable(f"the lock of {volume} cannot be had: {error}", volume=volume) from error


def _allocated_bytes(image: Any, size: int) -> int:
    """Return what the objects take as `rbd du` counts; all of it where only a scan of every object could tell."""
    if not image.features() & rbd.RBD_FEATURE_FAST_DIFF or image.flags() & rbd.RBD_FLAG_FAST_DIFF_INVALID:
        return size
    total = 0

    def add(_offset: int, length: int, exists: bool) -> None:
        nonlocal total
        total += length if exists else 0

    image.diff_iterate(0, size, None, add, include_parent=False, whole_object=True)
    return total
