"""Opening files beneath the pool's root and nowhere else.

Every path goes through openat2(2) with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS: no "..", no symlink, no mount
of /proc leads out, also when somebody swaps a directory for a symlink while we look. The root is opened anew
for each verb, so a pool that was mounted again is seen at once.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from providers.base import InvalidName, PoolFull, PoolUnavailable, VolumeNotFound

_SYS_OPENAT2 = 437  # the same on every architecture
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_beneath(directory_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """Return a descriptor of a path below a directory, close-on-exec.

    Raises OSError: ELOOP for a symlink, EXDEV for a way out. Source: openat2(2).
    """
    how = _OpenHow(
        flags | os.O_CLOEXEC | os.O_NOFOLLOW,
        mode if flags & os.O_CREAT else 0,
        _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS,
    )
    while True:
        descriptor: int = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(directory_fd),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if descriptor >= 0:
            return descriptor
        number = ctypes.get_errno()
        if number not in (errno.EINTR, errno.EAGAIN):
            raise OSError(number, os.strerror(number), path)


@contextmanager
def directory(path: Path | str, within: int | None = None) -> Iterator[int]:
    """Yield a descriptor of a directory: an absolute path, or one beneath another descriptor."""
    if within is None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    else:
        descriptor = open_beneath(within, str(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_volume(root_fd: int, name: str, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of a volume: a regular file directly in the root.

    Raises VolumeNotFound (also for a symlink, a directory or a device), InvalidName, OSError.
    """
    check_name(name)
    try:
        return open_file(root_fd, name, flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EXDEV, errno.ENXIO, errno.EISDIR, errno.ENOTDIR):
            raise VolumeNotFound(f"there is no volume {name!r} in this pool", volume=name) from None
        raise


def open_file(directory_fd: int, name: str, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of a regular file.

    Raises OSError: ELOOP for a symlink, EISDIR for a directory, ENXIO for what else is no regular file.
    """
    # O_NONBLOCK: opening a FIFO must not hang
    descriptor = open_beneath(directory_fd, name, flags | os.O_NONBLOCK)
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    except OSError:
        close_all([descriptor])
        raise
    if kind != stat.S_IFREG:
        os.close(descriptor)
        number = errno.EISDIR if kind == stat.S_IFDIR else errno.ENXIO
        raise OSError(number, "not a regular file", name)
    return descriptor


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors whose errors do not count any more: nothing was written, or it was synced, or is removed."""
    for descriptor in descriptors:
        with suppress(OSError):  # it is closed in any case
            os.close(descriptor)


def is_volume_name(name: str) -> bool:
    """Tell whether a file of this name can be a volume."""
    return (
        0 < len(name.encode(errors="surrogateescape")) <= 255
        and name[0] not in ".-"
        and ".." not in name
        and "/" not in name
        and name.isprintable()
    )


def check_name(name: str) -> None:
    """Raise InvalidName unless is_volume_name()."""
    if not is_volume_name(name):
        raise InvalidName(f"{name[:100]!r} cannot be a volume's name", volume=name[:255])


@contextmanager
def storage_errors(root: Path) -> Iterator[None]:
    """Turn what the file system answers into PoolFull or PoolUnavailable."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PoolFull(f"{root}: {error.strerror}; make room") from error
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EISDIR):
            raise PoolUnavailable(f"{root}: {error.filename} is not what Frostgate left there; remove it") from error
        if error.errno == errno.EROFS:
            raise PoolUnavailable(f"{root}: {error.strerror}; export and mount it writable") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise PoolUnavailable(
                f"{root}: {error.strerror} ({error.filename or 'its owner or mode'}); the gateway's user has to own "
                "the directory and its volumes, or be root; on NFS root is nobody unless the export says no_root_squash"
            ) from error
        if error.errno == errno.ESTALE:
            raise PoolUnavailable(f"{root}: it is another directory on the server now; mount it again") from error
        raise PoolUnavailable(f"{root}: {error.strerror or error}; is it mounted?") from error
