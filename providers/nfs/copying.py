"""Copying image files: by FICLONE at once, or sparsely with the holes kept."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator

from providers.base import Extent, PoolFull, ReportProgress

_FICLONE = 0x40049409
_CHUNK_BYTES = 16 * 1024 * 1024
CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL, errno.EXDEV)
"""What a file system answers that cannot share blocks."""


class Copied:
    """Adds up what has been copied, and reports it, never more than the total."""

    def __init__(self, progress: ReportProgress, total_bytes: int) -> None:
        """Report that nothing is done yet. Raises Cancelled."""
        self.done_bytes = 0
        self._progress = progress
        self._total_bytes = total_bytes
        progress(0, total_bytes)

    def add(self, length: int) -> None:
        """Count bytes that are done. Raises Cancelled."""
        self.done_bytes += length
        self._progress(min(self.done_bytes, self._total_bytes), self._total_bytes)


def check_room(root_fd: int, needed_bytes: int, what: str) -> None:
    """Raise PoolFull when the file system cannot take that much more. `what` needs it, in words. Raises OSError."""
    space = os.fstatvfs(root_fd)
    free = space.f_bavail * space.f_frsize
    if needed_bytes > free:
        raise PoolFull(f"{what} needs {needed_bytes} bytes and {free} are free; make room")


def clone(source: int, target: int) -> None:
    """Make target share all blocks of source. Raises OSError. Source: ioctl_ficlone(2)."""
    fcntl.ioctl(target, _FICLONE, source)


def data(descriptor: int, offset: int, end: int) -> Iterator[Extent]:
    """Yield what is not a hole between two positions, from the kernel (SEEK_DATA, SEEK_HOLE)."""
    while offset < end:
        try:
            begin = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # only a hole is left
            raise
        if begin >= end:
            return
        offset = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield Extent(begin, min(offset, end) - begin)


def copy(source: int, target: int, copied: Callable[[int], None]) -> None:
    """Copy a whole file, holes kept; target is overwritten.

    `copied` is called with the bytes of each part and may raise. Raises OSError.
    """
    size = os.fstat(source).st_size
    os.ftruncate(target, 0)
    os.ftruncate(target, size)
    for extent in data(source, 0, size):
        position, end = extent.offset, extent.offset + extent.length
        while position < end:
            done = _copy_part(source, target, position, min(_CHUNK_BYTES, end - position))
            if done == 0:
                raise OSError(errno.EIO, "the image became shorter while it was copied")
            position += done
            copied(done)


def _copy_part(source: int, target: int, offset: int, length: int) -> int:
    try:
        return os.copy_file_range(source, target, length, offset, offset)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    return os.pwrite(target, os.pread(source, length, offset), offset)
