"""Setting volumes back: a copy of the member is staged beside the snapshot and renamed over the volume.

The staged files are complete and durable, with the volume's owner, mode and attributes, before the first
rename; a rename that was done is not done again. While it is under way nobody can open the volumes for writing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from providers.base import CapabilityMissing, ReportProgress, SnapshotNotFound, VolumeNotFound
from providers.nfs import copying, imagelock, layout, restoring
from providers.nfs.beneath import close_all, directory, open_beneath, open_volume

_STAGED = ".staged.json"


def lock(root_fd: int, volumes: Sequence[str]) -> list[int]:
    """Keep the volumes that exist from being opened for writing, until the descriptors are closed.

    Raises VolumeInUse, OSError.
    """
    held: list[int] = []
    try:
        for volume in volumes:
            with suppress(VolumeNotFound):  # a lost volume is what a revert brings back
                held.append(open_volume(root_fd, volume))
                imagelock.hold(held[-1], volume)
    except BaseException:
        unlock(held)
        raise
    return held


def unlock(held: Sequence[int]) -> None:
    """End lock()."""
    close_all(held)


def stage(
    root_fd: int, group: str, volumes: Sequence[str], progress: ReportProgress, *, cloning: bool, instant: bool
) -> None:
    """Make complete, durable files beside the snapshot, ready to be renamed. Repeatable; all or nothing.

    `instant` refuses what takes longer the larger it is. Raises SnapshotNotFound, SnapshotDamaged, PoolFull,
    CapabilityMissing, Cancelled, OSError.
    """
    manifest = layout.manifest(root_fd, group)
    members = [manifest.member(volume) for volume in volumes]
    with (
        directory(layout.group_path(group), root_fd) as group_fd,
        restoring.sources(root_fd, group_fd, members) as sources,
    ):
        if instant and any(source.cost_bytes(cloning=cloning) for source in sources):
            raise CapabilityMissing(
                "these snapshots have to be copied back; revert without asking for an instant way", group=group
            )
        layout.remove_tree(group_fd, layout.REVERT)
        try:
            layout.make_directory(group_fd, layout.REVERT)
            with directory(layout.REVERT, group_fd) as staging_fd:
                _fill(root_fd, staging_fd, sources, progress, cloning)
                os.fsync(staging_fd)
                staged = layout.Cut(members=[restoring.needs(source) for source in sources])
                layout.write(staging_fd, _STAGED, staged)
            os.fsync(group_fd)
        except BaseException:
            layout.remove_tree(group_fd, layout.REVERT)
            raise


def _fill(
    root_fd: int,
    staging_fd: int,
    sources: Sequence[restoring.Source],
    progress: ReportProgress,
    cloning: bool,
) -> None:
    total = sum(source.cost_bytes(cloning=cloning) for source in sources)
    copying.check_room(root_fd, total, "setting the volumes back")
    copied = copying.Copied(progress, total)
    for source in sources:
        target = open_beneath(staging_fd, source.member.volume, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            restoring.write(source, target, copied.add, cloning=cloning)
            _attributes(root_fd, source.member).put_on(target)
            os.fsync(target)
        finally:
            os.close(target)


def _attributes(root_fd: int, member: layout.StoredMember) -> layout.Attributes:
    """Return those of the volume as it is now, or as it was at the cut when it is lost."""
    try:
        descriptor = open_volume(root_fd, member.volume)
    except VolumeNotFound:
        return member.attributes
    try:
        return layout.Attributes.of(descriptor)
    finally:
        os.close(descriptor)


def swap(root_fd: int, group: str) -> None:
    """Rename what is staged into place. Repeatable: what was renamed before is not there any more.

    Raises SnapshotNotFound when what was staged is lost, OSError.
    """
    with layout.group_directory(root_fd, group) as group_fd:
        if group_fd is None:
            raise SnapshotNotFound(f"the storage has no snapshot {group} to go on reverting to", group=group)
        with suppress(FileNotFoundError), directory(layout.REVERT, group_fd) as staging_fd:
            for member in _staged(staging_fd, group):
                restoring.put_back(root_fd, group_fd, member)
                with suppress(FileNotFoundError):
                    os.rename(member.volume, member.volume, src_dir_fd=staging_fd, dst_dir_fd=root_fd)
            os.fsync(root_fd)
        layout.remove_tree(group_fd, layout.REVERT)


def _staged(staging_fd: int, group: str) -> list[layout.StoredMember]:
    """Return what is staged; nothing when they were all renamed and only the directory is left."""
    lost = f"what was staged to revert to {group} is lost; revert again"
    try:
        staged = layout.read(staging_fd, _STAGED, layout.Cut)
    except layout.Damaged as error:
        raise SnapshotNotFound(f"{lost}: {error}", group=group) from None
    if staged:
        return staged.members
    if any(not name.startswith(".") for name in os.listdir(staging_fd)):
        raise SnapshotNotFound(lost, group=group)
    return []


def abort(root_fd: int, group: str) -> None:
    """Remove what is staged."""
    with layout.group_directory(root_fd, group) as group_fd:
        if group_fd is not None:
            layout.remove_tree(group_fd, layout.REVERT)
