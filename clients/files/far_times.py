"""Inodes with times that libfsext and libfsxfs refuse, shown with the times that they have.

The libraries take a time as 64 bits of nanoseconds, which end in 2262, and refuse the whole inode, and with it the
listing that it is in, when one does not fit; file systems go on, and anybody can set such a time. The library is given
the inode with other times, and what the disk says is told in their place. Runs in the confined process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

from clients.files.ranges import Bytes

STAND_IN_NS = -(1 << 31) * 10**9
"""What the library is given instead: the oldest time of both kinds of file system, as that is rare."""

T = TypeVar("T")
_BEYOND_NS = 1 << 63


class Inodes(Protocol):
    """Where the inodes of a file system lie, and their times."""

    root: int
    stand_in: Mapping[int, bytes]
    """What makes STAND_IN_NS of all times, by its place within an inode."""

    def offset(self, inode: int) -> int:
        """Return the place of an inode. Raises OSError when there is none of that number."""

    def times(self, inode: int) -> tuple[int, int, int, int]:
        """Return when it was modified, read, changed and made, in nanoseconds since 1970. Raises OSError."""


class FarTimes:
    """The bytes of a file system, as the library is to see them."""

    def __init__(self, source: Bytes, inodes: Inodes) -> None:
        """Take them as they are."""
        self._source = source
        self._inodes = inodes
        self._replaced: dict[int, bytes] = {}
        self.size_bytes = source.size_bytes

    def pread(self, offset: int, length: int) -> bytes:
        """See Bytes."""
        content = self._source.pread(offset, length)
        for place, instead in self._replaced.items():
            begin, end = max(place, offset), min(place + len(instead), offset + len(content))
            if begin < end:
                shown = instead[begin - place : end - place]
                content = content[: begin - offset] + shown + content[end - offset :]
        return content

    def opened(self, inode: int | None, by: Callable[[], T]) -> T:
        """Return what the library makes of an inode, the root directory's when None. Raises OSError."""
        try:
            return by()
        except OSError:
            inode = self._inodes.root if inode is None else inode
            if all(-_BEYOND_NS <= time < _BEYOND_NS for time in self._inodes.times(inode)):
                raise
            with self._hidden(inode):
                return by()

    def of(self, inode: int, modified: int, read: int, changed: int) -> tuple[int, int, int]:
        """Return the times of an inode, of which the library says these. Raises OSError."""
        if modified == read == changed == STAND_IN_NS:
            modified, read, changed, _ = self._inodes.times(inode)
        return modified, read, changed

    @contextmanager
    def _hidden(self, inode: int) -> Iterator[None]:
        offset = self._inodes.offset(inode)
        self._replaced = {offset + place: content for place, content in self._inodes.stand_in.items()}
        try:
            yield
        finally:
            self._replaced = {}
