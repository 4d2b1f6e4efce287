"""Working on rows of extents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from providers.base import Extent


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Yield ascending extents with those made one that touch or overlap."""
    last: Extent | None = None
    for extent in extents:
        if last and last.offset <= extent.offset <= last.offset + last.length:
            end = max(last.offset + last.length, extent.offset + extent.length)
            last = Extent(last.offset, end - last.offset)
            continue
        if last:
            yield last
        last = extent
    if last:
        yield last


def clipped(extents: Iterable[Extent], size_bytes: int) -> Iterator[Extent]:
    """Yield what of the extents lies before `size_bytes`."""
    for extent in extents:
        if extent.offset < size_bytes:
            yield Extent(extent.offset, min(extent.length, size_bytes - extent.offset))
