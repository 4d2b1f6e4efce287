"""Backing files: found beneath the pool's root and nowhere else, kept with the snapshot, and opened again.

A backing file (CloudStack's templates are some) is not written while volumes lie on it. A snapshot keeps it in its
group's directory, as a clone or, where the file system cannot clone, as one more link to it: so it outlives the
template's deletion. What a linked one would not survive, writing into it in place, is noticed by its size and time.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from providers.base import CapabilityMissing, SnapshotDamaged, SnapshotNotFound, VolumeChanged, VolumeInUse
from providers.nfs import copying, imagelock, layout, qcow2
from providers.nfs.beneath import close_all, directory, open_beneath, open_file
from providers.nfs.images import FORMATS
from providers.nfs.qemu import Image

_MOST_FILES = 32
_NO_LINK = (errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)  # EPERM also for what chattr +i made immutable


@dataclass(frozen=True, slots=True)
class Backing:
    """A backing file: where it lies beneath the root, and it, open."""

    path: str
    image: Image


@contextmanager
def opened(root_fd: int, volume: str, descriptor: int, mounts: Sequence[Path]) -> Iterator[list[Backing]]:
    """Yield what an open qcow2 volume has below it, from the top down; closed afterwards.

    `mounts` are the paths under which hypervisors and we see the root: only below them absolute names are followed.
    Raises CapabilityMissing when a file lies elsewhere, is missing or no image we know, VolumeInUse when somebody
    writes to it, OSError.
    """
    found: list[Backing] = []
    try:
        _follow(root_fd, volume, descriptor, mounts, found)
        yield found
    finally:
        close_all(backing.image.descriptor for backing in found)


def _follow(root_fd: int, volume: str, descriptor: int, mounts: Sequence[Path], found: list[Backing]) -> None:
    seen = {_inode(descriptor)}
    path, current = volume, descriptor
    while (header := qcow2.header(current, path)).backing:
        if len(found) == _MOST_FILES:
            raise _refused(volume, path, header.backing, f"the chain has more than {_MOST_FILES} files")
        written = _beneath(volume, path, header.backing, mounts)
        image = _open(root_fd, volume, path, written, header)
        below = os.path.normpath(written)  # the same file: no part of what was opened is a symlink
        found.append(Backing(below, image))
        inode = _inode(image.descriptor)
        if inode in seen:
            raise _refused(volume, path, header.backing, "the chain comes back to itself")
        seen.add(inode)
        if imagelock.is_in_use(image.descriptor):
            users = ", ".join(imagelock.users(image.descriptor)) or "somebody on another host"
            raise VolumeInUse(
                f"{below}, the backing file of {path}, is written to by {users}", volume=volume, users=users
            )
        if image.format == "raw":
            return
        path, current = below, image.descriptor


def _beneath(volume: str, image: str, name: str, mounts: Sequence[Path]) -> str:
    """Return the path from the root that a header means, as it is written there. Nothing is opened."""
    if name.startswith("/"):
        for mount in mounts:
            if name.startswith(f"{mount}/"):
                path = name.removeprefix(f"{mount}/").lstrip("/")
                break
        else:
            raise _refused(
                volume, image, name, "it does not lie in this pool; if it does, add its directory to hypervisor_paths"
            )
    else:
        if ":" in name.partition("/")[0]:
            raise _refused(volume, image, name, "it is no plain path")
        path = os.path.join(os.path.dirname(image), name)
    if os.path.normpath(path).partition("/")[0] == layout.SNAPSHOTS:
        raise _refused(volume, image, name, "it is a snapshot's, which goes when that is deleted")
    return path


def _open(root_fd: int, volume: str, image: str, path: str, header: qcow2.Header) -> Image:
    image_format = header.backing_format or "raw"
    if image_format not in FORMATS:
        raise _refused(volume, image, header.backing, f"its format {image_format!r} is not one of {', '.join(FORMATS)}")
    try:
        descriptor = open_beneath(root_fd, path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        why = f"it cannot be opened beneath the pool's root: {error.strerror}"
        raise _refused(volume, image, header.backing, why) from error
    why = ""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        why = "it is no regular file"
    elif not header.backing_format and os.pread(descriptor, 4, 0) == qcow2.MAGIC:
        # who opens it without our care takes it for qcow2, who is careful for raw: two different disks
        why = "its format is not recorded; `qemu-img rebase -u -F` records it"
    if why:
        os.close(descriptor)
        raise _refused(volume, image, header.backing, why)
    return Image(descriptor, image_format)


def _refused(volume: str, image: str, backing: str, why: str) -> CapabilityMissing:
    name = backing[:200]
    return CapabilityMissing(f"{name!r}, the backing file of {image}: {why}", volume=volume, backing=name)


def keep(group_fd: int, found: Sequence[Backing], *, cloning: bool) -> list[layout.StoredBacking]:
    """Keep backing files in a group's directory; those of several members once. Repeatable. Nothing is synced.

    Raises CapabilityMissing when one lies on another file system, OSError.
    """
    kept = []
    if found:
        layout.make_directory(group_fd, layout.BACKING)
    for backing in found:
        status = os.fstat(backing.image.descriptor)
        name = f"{status.st_ino:x}"
        with directory(layout.BACKING, group_fd) as backing_fd:
            try:
                os.stat(name, dir_fd=backing_fd, follow_symlinks=False)
            except FileNotFoundError:
                _keep(backing_fd, name, backing, cloning)
        kept.append(
            layout.StoredBacking(
                kept=name,
                format=backing.image.format,
                path=backing.path,
                file_bytes=status.st_size,
                mtime_ns=status.st_mtime_ns,
            )
        )
    return kept


def _keep(backing_fd: int, name: str, backing: Backing, cloning: bool) -> None:
    original = backing.image.descriptor
    if os.fstat(original).st_dev != os.fstat(backing_fd).st_dev:
        raise CapabilityMissing(f"{backing.path} lies on another file system than the pool", backing=backing.path)
    if not cloning:
        try:
            os.link(f"/proc/self/fd/{original}", name, dst_dir_fd=backing_fd, follow_symlinks=True)
        except OSError as error:
            if error.errno in _NO_LINK:
                raise CapabilityMissing(
                    f"{backing.path} cannot be kept with the snapshot: the file system does not link it "
                    f"({error.strerror})",
                    backing=backing.path,
                ) from error
            raise
        return
    status = os.fstat(original)
    temporary = f"{name}.new"
    copy = open_beneath(backing_fd, temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        copying.clone(original, copy)
        layout.Attributes.of(original).put_on(copy)
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    finally:
        os.close(copy)
    os.rename(temporary, name, src_dir_fd=backing_fd, dst_dir_fd=backing_fd)


def settle(group_fd: int, stored: layout.StoredMember) -> None:
    """Make a member's backing files durable. Raises VolumeChanged when one was written to since prepare, OSError."""
    for backing in stored.backing:
        descriptor = _open_kept(group_fd, f"{layout.BACKING}/{backing.kept}", stored.volume)
        try:
            if not is_unchanged(descriptor, backing):
                raise VolumeChanged(
                    f"{backing.path}, a backing file of {stored.volume}, was written to while it was snapshotted",
                    volume=stored.volume,
                    backing=backing.path,
                )
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if stored.backing:
        with directory(layout.BACKING, group_fd) as backing_fd:
            os.fsync(backing_fd)


@contextmanager
def member(group_fd: int, stored: layout.StoredMember) -> Iterator[list[Image]]:
    """Yield the chain that has a member's bytes, open for reading, the member's own file first; closed afterwards.

    Raises SnapshotNotFound when a file is missing, SnapshotDamaged when a backing file is not what it was, OSError.
    """
    chain: list[Image] = []
    try:
        chain.append(Image(_open_kept(group_fd, stored.volume, stored.volume), stored.stored_format))
        for backing in stored.backing:
            descriptor = _open_kept(group_fd, f"{layout.BACKING}/{backing.kept}", stored.volume)
            chain.append(Image(descriptor, backing.format))
            if not is_unchanged(descriptor, backing):
                raise SnapshotDamaged(
                    f"{backing.path or backing.kept}, a backing file of {stored.volume}, was written to after the cut",
                    volume=stored.volume,
                    backing=backing.path,
                )
        yield chain
    finally:
        close_all(image.descriptor for image in chain)


def is_unchanged(descriptor: int, backing: layout.StoredBacking) -> bool:
    """Tell whether an open file is the backing file as it was."""
    status = os.fstat(descriptor)
    return (status.st_size, status.st_mtime_ns) == (backing.file_bytes, backing.mtime_ns)


def _open_kept(group_fd: int, path: str, volume: str) -> int:
    try:
        return open_file(group_fd, path)
    except FileNotFoundError:
        raise SnapshotNotFound(f"the file {path} of the snapshot is missing", volume=volume) from None


def _inode(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
