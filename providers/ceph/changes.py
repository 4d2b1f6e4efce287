"""What differs between two states of images: a snapshot and another, or a snapshot and the present.

librbd's diff_iterate can begin only at a snapshot of the user's namespace that it knows by name: not at the
snapshots of an RBD group (before Ceph 20), and not at the present. So we ask the OSDs: an object that has the same
version in two states has the same content (rados_get_last_version; every write gives a new one). What is left is
compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import rados
import rbd

from providers.base import Extent
from providers.extents import clipped, merged

_BLOCK = 4096
_STATS_A_TASK = 64
_WINDOWS_A_BATCH = 1024
_SCAN_BYTES = 64 << 30

OpenData = Callable[[Any, int | None], Any]
"""Returns an I/O context of an image's data pool that reads a snapshot (None: the present); the caller closes it."""


@dataclass(frozen=True)
class View:
    """One state of an image: an open handle that is set to it. `snap_id` is None for the present."""

    image: Any
    snap_id: int | None


def allocated(view: View, offset: int, length: int, *, coarse: bool) -> Iterator[Extent]:
    """Yield what is not a hole, ascending, merged; by objects when `coarse`."""
    found = _iterated(view.image, None, offset, offset + length, coarse=coarse)
    yield from merged(extent for extent, exists in found if exists)


def since_snapshot(newer: View, base_name: str, *, coarse: bool) -> Iterator[Extent]:
    """Yield what changed since a snapshot of the same image that librbd knows by name."""
    for extent, _ in _iterated(newer.image, base_name, 0, newer.image.size(), coarse=coarse):
        yield extent


def _iterated(image: Any, base: str | None, offset: int, end: int, *, coarse: bool) -> Iterator[tuple[Extent, bool]]:
    """Yield what diff_iterate finds, and whether there is data in it; asked part by part, to hold no more than one."""
    for start in range(offset, end, _SCAN_BYTES):
        found: list[tuple[Extent, bool]] = []

        def add(at: int, length: int, exists: bool, found: list[tuple[Extent, bool]] = found) -> None:
            found.append((Extent(at, length), exists))

        image.diff_iterate(start, min(_SCAN_BYTES, end - start), base, add, include_parent=True, whole_object=coarse)
        yield from found


def windows(older: View, newer: View, open_data: OpenData, executor: Executor) -> Iterator[Extent]:
    """Yield, by objects and ascending, where two states may differ, within the larger of the two."""
    candidates = _candidates(older, newer)
    if not _same_objects(older, newer):
        yield from candidates
        return
    object_size = 1 << newer.image.stat()["order"]
    prefix = newer.image.block_name_prefix()
    while batch := list(islice(candidates, _WINDOWS_A_BATCH)):
        tasks = [batch[start : start + _STATS_A_TASK] for start in range(0, len(batch), _STATS_A_TASK)]

        def changed(task: Sequence[Extent]) -> list[Extent]:
            names = [f"{prefix}.{extent.offset // object_size:016x}" for extent in task]
            before = _versions(open_data(older.image, older.snap_id), names)
            after = _versions(open_data(newer.image, newer.snap_id), names)
            return [extent for extent, old, new in zip(task, before, after, strict=True) if old != new]

        for found in executor.map(changed, tasks):
            yield from found


class Probe:
    """Some of the objects of an image's windows, by which one sees how far a rollback of it is."""

    def __init__(self, image: Any, found: Sequence[Extent], at_most: int, open_data: OpenData) -> None:
        """Note the objects' versions. Striped images, whose windows are not objects, have no probes."""
        self.objects = 0
        self._image, self._open_data = image, open_data
        if not _is_plain(image):
            return
        object_size, prefix = 1 << image.stat()["order"], image.block_name_prefix()
        chosen = found[:: max(1, -(-len(found) // max(1, at_most)))]
        self._names = [f"{prefix}.{window.offset // object_size:016x}" for window in chosen]
        self.objects = len(self._names)
        self._before = self._now()

    def changed(self) -> int:
        """Return how many of the objects have changed since."""
        if not self.objects:
            return 0
        return sum(old != new for old, new in zip(self._before, self._now(), strict=True))

    def _now(self) -> list[int | None]:
        return _versions(self._open_data(self._image, None), self._names)


def differences(older: View, newer: View, window: Extent) -> tuple[bytes, list[Extent]]:
    """Compare a window byte by byte; return the newer's bytes (zeros beyond its end) and where they differ.

    The extents are relative to the window, multiples of 4 KiB but for its end.
    """
    before, after = read(older.image, window), read(newer.image, window)
    runs: list[Extent] = []
    if before == after:
        return after, runs
    begin = -1
    for offset in range(0, window.length, _BLOCK):
        if before[offset : offset + _BLOCK] != after[offset : offset + _BLOCK]:
            begin = offset if begin < 0 else begin
        elif begin >= 0:
            runs.append(Extent(begin, offset - begin))
            begin = -1
    if begin >= 0:
        runs.append(Extent(begin, window.length - begin))
    return after, runs


def exact(older: View, newer: View, found: Iterator[Extent], executor: Executor) -> Iterator[Extent]:
    """Yield which parts of the windows differ, ascending and clipped to the newer's size."""
    size = newer.image.size()
    while batch := list(islice(found, 8)):
        compared = executor.map(lambda window: differences(older, newer, window)[1], batch)
        for window, runs in zip(batch, compared, strict=True):
            yield from clipped((Extent(window.offset + run.offset, run.length) for run in runs), size)


def set_equal(source: View, target: Any, found: Sequence[Extent], executor: Executor) -> Iterator[int]:
    """Make the target's windows equal to the source's, writing only what differs; yields bytes done now and then.

    Both have the same size. Repeatable after a crash. Flushes at the end.
    """
    present = View(target, None)

    def copy(window: Extent) -> int:
        content, runs = differences(present, source, window)
        for run in runs:
            part = content[run.offset : run.offset + run.length]
            if part.count(0) == len(part):
                target.write_zeroes(window.offset + run.offset, run.length)
            else:
                target.write(part, window.offset + run.offset)
        return window.length

    todo = iter(found)
    while batch := list(islice(todo, 16)):
        yield sum(executor.map(copy, batch))
    target.flush()


def read(image: Any, extent: Extent) -> bytes:
    """Return an extent's bytes; beyond the image's end they are zeros."""
    length = max(0, min(extent.length, image.size() - extent.offset))
    content: bytes = image.read(extent.offset, length) if length else b""
    return content + bytes(extent.length - length)


def _candidates(older: View, newer: View) -> Iterator[Extent]:
    """Yield one window an object that either of them has."""
    object_size = max(1 << view.image.stat()["order"] for view in (older, newer))
    end = max(older.image.size(), newer.image.size())
    for start in range(0, end, _SCAN_BYTES):
        numbers: set[int] = set()
        for view in (older, newer):
            length = min(_SCAN_BYTES, view.image.size() - start)
            if length > 0:
                for extent in allocated(view, start, length, coarse=True):
                    last = extent.offset + extent.length - 1
                    numbers.update(range(extent.offset // object_size, last // object_size + 1))
        for number in sorted(numbers):
            offset = number * object_size
            yield Extent(offset, min(object_size, end - offset))


def _same_objects(older: View, newer: View) -> bool:
    """Tell whether object versions can be compared: one image, one byte range an object, the same parent."""

    def layout(image: Any) -> tuple[Any, ...]:
        return (image.id(), _is_plain(image), _overlap(image))

    first = layout(older.image)
    return first[1] and first == layout(newer.image)


def _is_plain(image: Any) -> bool:
    return bool(image.stripe_count() == 1 and image.stripe_unit() == 1 << image.stat()["order"])


def _overlap(image: Any) -> int:
    try:
        return int(image.overlap())
    except rbd.ImageNotFound:
        return 0


def _versions(context: Any, names: Sequence[str]) -> list[int | None]:
    """Return the version that each object has in the context's snapshot, None for what is not there."""
    found: list[int | None] = []
    try:
        for name in names:
            try:
                context.stat(name)
            except rados.ObjectNotFound:
                found.append(None)
            else:
                found.append(context.get_last_version())
    finally:
        context.close()
    return found
