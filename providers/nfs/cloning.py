"""New volumes from members: made without a name, complete and durable, then linked into place; whole or not at all.

What a clone made is known again by its file handle, which the kernel gives to no other file: it is written down in
the group's directory before the link. Where files without a name cannot be made (NFS) the unfinished one lies in the
group's directory, until the next clone of the group or the group's end.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel

from providers.base import InvalidName, ReportProgress, VolumeExists, VolumeNotFound
from providers.nfs import copying, layout, restoring
from providers.nfs.beneath import check_name, open_beneath, open_volume
from providers.nfs.images import Format, format_of

_CLONES = ".clones.json"
_UNFINISHED = ".clone"
_AT_EMPTY_PATH = 0x1000
_MAX_HANDLE_BYTES = 128
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)

_libc = ctypes.CDLL(None, use_errno=True)


class Clones(BaseModel):
    """The volumes that a group's clones made: name to `handle`, and which member each was made of."""

    made: dict[str, tuple[str, str]] = {}


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _MAX_HANDLE_BYTES),
    )


def clone(
    root_fd: int,
    group: str,
    volume: str,
    target: str,
    default_format: Format,
    progress: ReportProgress,
    *,
    cloning: bool,
) -> None:
    """Make a volume of a member. A volume that this clone has made before is left as it is.

    Raises VolumeExists, InvalidName, SnapshotNotFound, SnapshotDamaged, PoolFull, CapabilityMissing, Cancelled,
    OSError.
    """
    check_name(target)
    member = layout.manifest(root_fd, group).member(volume)
    if (seen_as := format_of(target, None, default_format)) != member.format:
        raise InvalidName(
            f"{target} would be taken for {seen_as}, and {volume} is {member.format}: "
            f"choose a name like {target.removesuffix(f'.{seen_as}')}.{member.format}",
            volume=target,
        )
    with layout.group_directory(root_fd, group) as group_fd:
        assert group_fd is not None  # noqa: S101 - its manifest was just read
        made = _made(group_fd)
        if _exists(root_fd, target, volume, made):
            os.fsync(root_fd)  # it may have failed after the link
            return
        with restoring.sources(root_fd, group_fd, [member]) as (source,), _new_file(group_fd) as (new, path):
            _fill(root_fd, source, new, progress, cloning)
            made.made[target] = (volume, _handle(new))
            layout.write(group_fd, _CLONES, _still_there(root_fd, made, target))
            restoring.put_back(root_fd, group_fd, restoring.needs(source))
            try:
                os.link(path, target, dst_dir_fd=root_fd, follow_symlinks=True)
            except FileExistsError:
                raise _taken(target) from None
            os.fsync(root_fd)


def _fill(root_fd: int, source: restoring.Source, new: int, progress: ReportProgress, cloning: bool) -> None:
    total = source.cost_bytes(cloning=cloning)
    copying.check_room(root_fd, total, "the clone")
    restoring.write(source, new, copying.Copied(progress, total).add, cloning=cloning)
    source.member.attributes.put_on(new)
    os.fsync(new)


@contextmanager
def _new_file(group_fd: int) -> Iterator[tuple[int, str]]:
    """Yield an empty file and a path by which it can be linked; without a link it is gone afterwards."""
    layout.remove(group_fd, _UNFINISHED)  # of a clone that was killed
    try:
        descriptor = open_beneath(group_fd, ".", os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        if error.errno not in _NO_UNNAMED:
            raise
        descriptor = open_beneath(group_fd, _UNFINISHED, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield descriptor, f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
        layout.remove(group_fd, _UNFINISHED)


def _exists(root_fd: int, target: str, volume: str, made: Clones) -> bool:
    """Tell whether the target is there and of this clone. Raises VolumeExists when it is another file."""
    try:
        os.stat(target, dir_fd=root_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    try:
        descriptor = open_volume(root_fd, target)
    except VolumeNotFound:
        raise _taken(target) from None
    try:
        handle = _handle(descriptor)
    finally:
        os.close(descriptor)
    if not handle or made.made.get(target) != (volume, handle):
        raise _taken(target)
    return True


def _taken(target: str) -> VolumeExists:
    return VolumeExists(f"there is another volume {target}; choose another name", volume=target)


def _made(group_fd: int) -> Clones:
    try:
        return layout.read(group_fd, _CLONES, Clones) or Clones()
    except layout.Damaged:
        return Clones()  # what it knew of is another's volume now, and stays


def _still_there(root_fd: int, made: Clones, target: str) -> Clones:
    """Forget the volumes that are gone, so that the record stays small."""
    return Clones(
        made={
            name: what for name, what in made.made.items() if name == target or os.access(name, os.F_OK, dir_fd=root_fd)
        }
    )


def _handle(descriptor: int) -> str:
    """Return what no other file ever has, "" on a file system that does not tell. Source: name_to_handle_at(2)."""
    handle = _FileHandle(handle_bytes=_MAX_HANDLE_BYTES)
    mount = ctypes.c_int()
    if _libc.name_to_handle_at(descriptor, b"", ctypes.byref(handle), ctypes.byref(mount), _AT_EMPTY_PATH) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.EOVERFLOW):
            return ""
        raise OSError(number, os.strerror(number))
    return f"{handle.handle_type:x}:{bytes(handle.f_handle[: handle.handle_bytes]).hex()}"
