"""Where a file's bytes lie on the disk: FIEMAP, and what two files share of it.

Source: Documentation/filesystems/fiemap.rst; linux/fiemap.h.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_FS_IOC_FIEMAP = 0xC020660B
_SYNC = 1
_HEAD = struct.Struct("=QQLLLL")
_EXTENT = struct.Struct("=QQQ16xL12x")
_EXTENTS_A_CALL = 512
_LAST, _SHARED = 0x1, 0x2000
_CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Placed:
    """A range of a file's bytes that lie, as they are, at `physical` of the file system's device."""

    offset: int
    length: int
    physical: int


def shared(first: int, first_offset: int, second: int, second_offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield (position, length) of what two ranges of files, on one file system, have in the same place of the disk.

    Positions are relative to the ranges, ascending. Only what is certain: blocks that both files say they share, whose
    content is nothing but the bytes, and that were not moved while we looked. Raises OSError.
    """
    ours = _placed(first, first_offset, length)
    theirs = _placed(second, second_offset, length) if ours else []
    if not theirs or ours != _placed(first, first_offset, length):
        return
    index = 0
    for mine in ours:
        begin, end = mine.offset - first_offset, mine.offset + mine.length - first_offset
        while index < len(theirs):
            other = theirs[index]
            other_begin = other.offset - second_offset
            low, high = max(begin, other_begin), min(end, other_begin + other.length)
            if low < high and mine.physical + low - begin == other.physical + low - other_begin:
                yield low, high - low
            if other_begin + other.length > end:
                break
            index += 1


def is_told(descriptor: int) -> bool:
    """Tell whether the file system says where a file's bytes lie. Raises OSError."""
    return _asked(descriptor, 0, 1) is not None


def _placed(descriptor: int, offset: int, length: int) -> list[Placed]:
    """Return what of a range has a certain, shared place; nothing on a file system that does not tell."""
    found = []
    position, end = offset, offset + length
    while position < end:
        answer = _asked(descriptor, position, end - position)
        if answer is None:
            return []
        count = _HEAD.unpack_from(answer)[3]
        flags = _LAST
        for index in range(count):
            logical, physical, size, flags = _EXTENT.unpack_from(answer, _HEAD.size + index * _EXTENT.size)
            low, high = max(logical, position), min(logical + size, end)
            if flags & ~_LAST == _SHARED and low < high:
                found.append(Placed(low, high - low, physical + low - logical))
            position = max(position, high)
        if count < _EXTENTS_A_CALL or flags & _LAST:
            break
    return found


def _asked(descriptor: int, offset: int, length: int) -> bytearray | None:
    """Return what FIEMAP answers, None on a file system that has it not."""
    request = bytearray(_HEAD.size + _EXTENTS_A_CALL * _EXTENT.size)
    _HEAD.pack_into(request, 0, offset, length, _SYNC, 0, _EXTENTS_A_CALL, 0)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, request)
    except OSError as error:
        if error.errno in _CANNOT:
            return None
        raise
    return request
