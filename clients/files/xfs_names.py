"""The names in an XFS directory, and the target of a short link, as bytes: where libfsxfs has none (not UTF-8).

Runs in the confined process, and only for what the library refuses, because no library of a licence that we can use
gives them. Where a directory's blocks lie is told by libfsxfs; of ours are the entries within them.
Source: XFS Filesystem Structure, "Directories", "Shortform Directories"; xfs_da_format.h.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from clients.files.ranges import Bytes
from clients.files.xfs_inodes import XfsInodes

_V5_BLOCKS = {b"XDB3": True, b"XDD3": False}  # is it the only block of its directory, with the index at its end?
_V4_BLOCKS = {b"XD2B": True, b"XD2D": False}
_V5_HEADER_BYTES, _V4_HEADER_BYTES = 64, 16
_UNUSED = 0xFFFF
_MOST_BYTES = 256 * 1024 * 1024
_FILE_TYPES_V4 = 0x200
_FILE_TYPES_V5 = 0x1


class XfsNames:
    """The names in the directories of one file system."""

    def __init__(self, source: Bytes, inodes: XfsInodes) -> None:
        """Take its bytes and inodes. Raises OSError."""
        head = inodes.superblock
        self._source = source
        self._inodes = inodes
        self._directory_bytes = inodes.block_bytes << head[192]
        (version,) = struct.unpack_from(">H", head, 100)
        more, incompatible = struct.unpack_from(">I", head, 200)[0], struct.unpack_from(">I", head, 216)[0]
        self._v5 = version & 0xF == 5
        self._types = bool(incompatible & _FILE_TYPES_V5 if self._v5 else more & _FILE_TYPES_V4)
        if self._directory_bytes > 65536:
            raise OSError(errno.EIO, "an impossible superblock")

    def of(self, inode: int, directory: Any) -> dict[bytes, int]:
        """Return the names with their inodes of a directory, which libfsxfs has opened. Raises OSError."""
        short = self._inodes.within(inode)
        try:
            found = list(self._short(short) if short is not None else self._long(_extents(directory)))
        except (IndexError, struct.error):
            raise OSError(errno.EIO, "a damaged directory") from None
        return {name: number for name, number in found if name not in (b".", b"..")}

    def target(self, inode: int, length: int) -> bytes:
        """Return where a link points that is kept within its inode. Raises OSError."""
        target = self._inodes.within(inode)
        if target is None:
            raise OSError(errno.EIO, "the target of this link is neither UTF-8 nor short")
        return target[:length]

    def _short(self, content: bytes) -> Iterator[tuple[bytes, int]]:
        count, wide = content[0], content[1]
        number_bytes = 8 if wide else 4
        at = 2 + number_bytes
        for _ in range(count):
            length = content[at]
            name = content[at + 3 : at + 3 + length]
            at += 3 + length + self._types
            number = content[at : at + number_bytes]
            if len(number) < number_bytes:
                raise OSError(errno.EIO, "a directory ends within an entry")
            yield name, int.from_bytes(number, "big")
            at += number_bytes

    def _long(self, extents: Sequence[tuple[int, int]]) -> Iterator[tuple[bytes, int]]:
        if sum(length for _, length in extents) > _MOST_BYTES:
            raise OSError(errno.EFBIG, "too large a directory")
        # one block of a directory can lie in several extents
        content = b"".join(self._source.pread(self._place(offset), length) for offset, length in extents)
        for at in range(0, len(content), self._directory_bytes):
            yield from self._block(content[at : at + self._directory_bytes])

    def _place(self, offset: int) -> int:
        """Return where an extent lies: libfsxfs (20260901) takes a block number, which has gaps, for a place."""
        group, block = divmod(offset // self._inodes.block_bytes, 1 << self._inodes.group_log)
        return (group * self._inodes.group_blocks + block) * self._inodes.block_bytes

    def _block(self, content: bytes) -> Iterator[tuple[bytes, int]]:
        single = (_V5_BLOCKS if self._v5 else _V4_BLOCKS).get(content[:4])
        if single is None or len(content) < self._directory_bytes:
            return  # an index, in which there are no names
        at, end = _V5_HEADER_BYTES if self._v5 else _V4_HEADER_BYTES, len(content)
        if single:
            (indexed,) = struct.unpack_from(">I", content, end - 8)
            end -= 8 + 8 * indexed
        while at + 12 <= end:
            tag, length = struct.unpack_from(">HH", content, at)
            if tag == _UNUSED:
                if not length or length % 8:
                    raise OSError(errno.EIO, "a damaged directory")
                at += length
                continue
            number, size = struct.unpack_from(">QB", content, at)
            yield content[at + 9 : at + 9 + size], number
            at += -(-(9 + size + self._types + 2) // 8) * 8


def _extents(directory: Any) -> list[tuple[int, int]]:
    """Return where libfsxfs says that a directory's blocks lie, as (offset, length)."""
    found = [directory.get_extent(index) for index in range(int(directory.number_of_extents))]
    return [(int(offset), int(length)) for offset, length, _ in found]
