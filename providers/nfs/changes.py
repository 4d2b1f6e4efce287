"""What differs between two snapshots of a volume: what is allocated in either, less what is certainly the same bytes.

Certain is what both have in the same place: the same file (a template, an image that several snapshots have below
their own), or the same blocks of the disk (clones). Everything else is compared byte by byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from providers.base import BlockReader, Extent
from providers.extents import merged
from providers.nfs import fiemap, qemu

_BLOCK = 4096
_WINDOW = 4 << 20
_MAP_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: its chain, open, and a reader of its bytes."""

    chain: qemu.Chain
    reader: BlockReader


@dataclass(frozen=True, slots=True)
class _Place:
    """Guest bytes that lie as they are in a file from `offset` on."""

    start: int
    length: int
    file: int
    offset: int


def changed(newer: Side, base: Side, *, cloning: bool, coarse: bool) -> Iterator[Extent]:
    """Yield what differs, ascending and merged, within the newer's size; beyond the base's end there are zeros.

    `cloning` says that the file system shares blocks. If it also says which, `coarse` does not read at all: what is
    not certainly the same is told. Raises PoolUnavailable, SnapshotDamaged, OSError.
    """
    size = newer.reader.size_bytes
    cloning = cloning and fiemap.is_told(newer.chain[0].descriptor)  # NFS clones, and tells nothing
    both = _union(_allocated(newer, size), _allocated(base, size))
    if cloning or _common_file(newer, base):
        both = _without(both, _same(newer, base, cloning))
    if coarse and cloning:
        yield from both
        return
    yield from merged(_differing(newer.reader, base.reader, both))


def _allocated(side: Side, size: int) -> Iterator[Extent]:
    return side.reader.extents(0, min(side.reader.size_bytes, size))


def _common_file(newer: Side, base: Side) -> bool:
    return bool(
        {_inode(image.descriptor) for image in newer.chain} & {_inode(image.descriptor) for image in base.chain}
    )


def _union(first: Iterator[Extent], second: Iterator[Extent]) -> Iterator[Extent]:
    def ascending() -> Iterator[Extent]:
        one, other = next(first, None), next(second, None)
        while one or other:
            if one and (other is None or one.offset <= other.offset):
                yield one
                one = next(first, None)
            elif other:
                yield other
                other = next(second, None)

    yield from merged(ascending())


def _without(extents: Iterator[Extent], taken: Iterator[Extent]) -> Iterator[Extent]:
    """Yield what of the extents is not taken; both ascending."""
    gap = next(taken, None)
    for extent in extents:
        position, end = extent.offset, extent.offset + extent.length
        while gap and gap.offset < end:
            if gap.offset > position:
                yield Extent(position, gap.offset - position)
            position = max(position, gap.offset + gap.length)
            if position >= end:
                break
            gap = next(taken, None)
        if position < end:
            yield Extent(position, end - position)


def _same(newer: Side, base: Side, cloning: bool) -> Iterator[Extent]:
    """Yield, ascending, what is certainly the same bytes in both."""
    ours, theirs = _places(newer.chain), _places(base.chain)
    mine, other = next(ours, None), next(theirs, None)
    while mine and other:
        low = max(mine.start, other.start)
        high = min(mine.start + mine.length, other.start + other.length)
        if low < high:
            offsets = mine.offset + low - mine.start, other.offset + low - other.start
            if offsets[0] == offsets[1] and _inode(mine.file) == _inode(other.file):
                yield Extent(low, high - low)
            elif cloning:
                for position, length in fiemap.shared(mine.file, offsets[0], other.file, offsets[1], high - low):
                    yield Extent(low + position, length)
        if mine.start + mine.length <= other.start + other.length:
            mine = next(ours, None)
        else:
            other = next(theirs, None)


def _places(chain: qemu.Chain) -> Iterator[_Place]:
    """Yield where guest bytes lie, ascending, in parts that are not too large to be looked at at once."""
    if [image.format for image in chain] == ["raw"]:
        whole = os.fstat(chain[0].descriptor).st_size
        found = iter([qemu.Mapped(0, whole, 0, False, 0)] if whole else [])
    else:
        found = qemu.mapped(chain)
    for entry in found:
        if entry.offset is None:
            continue
        for done in range(0, entry.length, _MAP_BYTES):
            length = min(_MAP_BYTES, entry.length - done)
            yield _Place(entry.start + done, length, chain[entry.depth].descriptor, entry.offset + done)


def _differing(newer: BlockReader, base: BlockReader, extents: Iterator[Extent]) -> Iterator[Extent]:
    """Compare byte by byte; yield the blocks that differ, aligned but for the ends."""
    for extent in extents:
        position, end = extent.offset, extent.offset + extent.length
        while position < end:
            length = min(_WINDOW - position % _WINDOW, end - position)
            after, before = newer.read(position, length), _read(base, position, length)
            if after != before:
                yield from _blocks(position, memoryview(after), memoryview(before))
            position += length


def _blocks(offset: int, after: memoryview, before: memoryview) -> Iterator[Extent]:
    position = 0
    while position < len(after):
        length = min(_BLOCK - (offset + position) % _BLOCK, len(after) - position)
        if after[position : position + length] != before[position : position + length]:
            yield Extent(offset + position, length)
        position += length


def _read(reader: BlockReader, offset: int, length: int) -> bytes:
    """Read; beyond the end there are zeros."""
    inside = max(0, min(length, reader.size_bytes - offset))
    return (reader.read(offset, inside) if inside else b"") + bytes(length - inside)


def _inode(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
