"""Where the inodes of XFS lie, what they keep within themselves, and their times: where libfsxfs refuses to say.

Runs in the confined process. Source: XFS Filesystem Structure, "Superblocks", "Inode Core"; xfs_format.h (bigtime).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping

from clients.files.ranges import Bytes

_LOCAL = 1
_V3_CORE_BYTES, _V2_CORE_BYTES = 176, 100
_MODIFIED, _READ, _CHANGED, _MADE = 40, 32, 48, 144
_FLAGS_2, _BIG_TIME = 120, 1 << 3
_EPOCH_S = 1 << 31


class XfsInodes:
    """The inodes of one file system."""

    def __init__(self, source: Bytes) -> None:
        """Read the superblock. Raises OSError."""
        self.superblock = source.pread(0, 512)
        if len(self.superblock) < 512:
            raise OSError(errno.EIO, "no superblock")
        self._source = source
        self.stand_in: Mapping[int, bytes] = {_READ: bytes(24), _MADE: bytes(8)}
        self.block_bytes = int(struct.unpack_from(">I", self.superblock, 4)[0])
        self.group_blocks = int(struct.unpack_from(">I", self.superblock, 84)[0])
        self.root = int(struct.unpack_from(">Q", self.superblock, 56)[0])
        self._inode_bytes = int(struct.unpack_from(">H", self.superblock, 104)[0])
        self._inodes_log, self.group_log = self.superblock[123], self.superblock[124]
        if not (512 <= self.block_bytes <= 65536 and 256 <= self._inode_bytes <= 2048):
            raise OSError(errno.EIO, "an impossible superblock")

    def offset(self, inode: int) -> int:
        """See far_times.Inodes."""
        group, rest = divmod(inode, 1 << (self.group_log + self._inodes_log))
        block, slot = divmod(rest, 1 << self._inodes_log)
        return (group * self.group_blocks + block) * self.block_bytes + slot * self._inode_bytes

    def times(self, inode: int) -> tuple[int, int, int, int]:
        """See far_times.Inodes."""
        content = self._content(inode)
        later = content[4] == 3
        big = later and struct.unpack_from(">Q", content, _FLAGS_2)[0] & _BIG_TIME

        def time(at: int) -> int:
            if big:
                return int(struct.unpack_from(">Q", content, at)[0]) - _EPOCH_S * 10**9
            seconds, nanoseconds = struct.unpack_from(">iI", content, at)
            return int(seconds) * 10**9 + int(nanoseconds)

        return time(_MODIFIED), time(_READ), time(_CHANGED), time(_MADE) if later else 0

    def within(self, inode: int) -> bytes | None:
        """Return what an inode keeps within itself, None when it does not. Raises OSError."""
        content = self._content(inode)
        begin = _V3_CORE_BYTES if content[4] == 3 else _V2_CORE_BYTES
        end = begin + content[82] * 8 if content[82] else self._inode_bytes
        return content[begin:end] if content[5] == _LOCAL else None

    def _content(self, inode: int) -> bytes:
        content = self._source.pread(self.offset(inode), self._inode_bytes)
        if content[:2] != b"IN" or len(content) < self._inode_bytes:
            raise OSError(errno.EIO, "no inode there")
        return content
