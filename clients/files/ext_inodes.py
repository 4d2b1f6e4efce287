"""Where the inodes of ext2/3/4 lie, and their times, for what libfsext refuses. Runs in the confined process.

Where a group's table begins is told by libext2fs. Source: ext4(5) disk layout, "Inode Table", "Inode Timestamps".
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping

from clients.files.ext_attributes import ExtAttributes
from clients.files.ranges import Bytes

_SUPERBLOCK, _SUPERBLOCK_BYTES = 1024, 1024
_OLD_INODE_BYTES = 128
# within an inode: seconds, and what epochs and nanoseconds are added to them where the inode is long enough
_MODIFIED, _READ, _CHANGED, _MADE = (16, 136), (8, 140), (12, 132), (144, 148)


class ExtInodes:
    """The inodes of one file system; it is read when first asked."""

    root = 2

    def __init__(self, source: Bytes, attributes: ExtAttributes) -> None:
        """Take its bytes, and libext2fs's view of it."""
        self._source = source
        self._library = attributes
        oldest = struct.pack("<i", -(1 << 31))
        self.stand_in: Mapping[int, bytes] = {8: oldest * 3, 132: bytes(12), 144: oldest + bytes(4)}

    def offset(self, inode: int) -> int:
        """See Inodes."""
        head = self._source.pread(_SUPERBLOCK, _SUPERBLOCK_BYTES).ljust(_SUPERBLOCK_BYTES, b"\0")
        inodes, block_log, of_group = (int(struct.unpack_from("<I", head, at)[0]) for at in (0, 24, 40))
        if not 0 < inode <= inodes or not of_group or block_log > 6:
            raise OSError(errno.EIO, "no inode of that number")
        group, index = divmod(inode - 1, of_group)
        return self._library.table_block(group) * (1024 << block_log) + index * self._inode_bytes()

    def times(self, inode: int) -> tuple[int, int, int, int]:
        """See Inodes."""
        length = self._inode_bytes()
        content = self._source.pread(self.offset(inode), length)
        if len(content) < length:
            raise OSError(errno.EIO, "no inode there")
        extra = struct.unpack_from("<H", content, _OLD_INODE_BYTES)[0] if length > _OLD_INODE_BYTES else 0
        end = min(length, _OLD_INODE_BYTES + extra)
        modified, read, changed, made = (_time(content[:end], *place) for place in (_MODIFIED, _READ, _CHANGED, _MADE))
        return modified, read, changed, made

    def _inode_bytes(self) -> int:
        revision = self._source.pread(_SUPERBLOCK + 76, 4)
        length = struct.unpack("<H", self._source.pread(_SUPERBLOCK + 88, 2).ljust(2, b"\0"))[0]
        return max(_OLD_INODE_BYTES, int(length)) if revision.strip(b"\0") else _OLD_INODE_BYTES


def _time(content: bytes, seconds_at: int, extra_at: int) -> int:
    if len(content) < seconds_at + 4:
        return 0
    seconds = int(struct.unpack_from("<i", content, seconds_at)[0])
    extra = int(struct.unpack_from("<I", content, extra_at)[0]) if len(content) >= extra_at + 4 else 0
    return (seconds + ((extra & 3) << 32)) * 10**9 + (extra >> 2)
