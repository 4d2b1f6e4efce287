"""Which members are exported, and reading them: the gateway's rules for whoever comes by NBD.

Only members of READY snapshots are; when a snapshot is deleted, whoever reads it is put out first. Each connection has
a reader of its own and a thread that may hang with it; the number of connections is bounded per pool, so that a
storage that hangs holds no other pool's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from frostgate.v1 import volume_pb2
from gateway import states, streaming, taking
from gateway.errors import Refused
from gateway.groups import Core
from gateway.journal import Filter
from gateway.metrics import BUSY_THREADS
from gateway.nbd.protocol import State
from gateway.pools import Pool
from gateway.readers import Hold
from providers.base import BlockReader, Extent

T = TypeVar("T")

_SCAN_BYTES = 256 * 1024 * 1024
_SCAN_EXTENTS = 1000
_PAGE = 500
_HOLE = State.HOLE | State.ZERO


class Exports:
    """The exports of a gateway, for the threads of its connections. What they ask is answered in the event loop."""

    def __init__(self, core: Core) -> None:
        """Take the gateway's core, in its event loop."""
        self.core = core
        self._loop = asyncio.get_running_loop()
        self._attached: Counter[str] = Counter()
        self._given: set[Export] = set()

    def names(self) -> Iterator[str]:
        """Yield the name of every member that can be read. Blocks."""
        before: int | None = None
        while groups := self._ask(self.core.journal.page(Filter(states=tuple(states.READABLE)), before, _PAGE)):
            for group in groups:
                for member in group.snapshot.members:
                    yield name_of(group.id, member.volume)
            before = groups[-1].seq

    def attach(self, name: str, end: Callable[[], None]) -> Export:
        """Return an export; `end` is called when it has to be closed, from any thread. Blocks.

        Raises Refused (also LIMIT_EXCEEDED), ProviderError.
        """
        group_id, pool, volume = _parts(name)
        hold = Hold(end)
        self._ask(self._admit(group_id, pool, hold))
        export = Export(self, name, group_id, volume_pb2.VolumeRef(pool=pool, volume=volume), hold)
        try:
            export.open()
        except BaseException:
            export.close()
            raise
        self._given.add(export)
        BUSY_THREADS.labels(pool=pool, lane="nbd").set_function(partial(self._busy, pool))
        return export

    def open(self, group_id: str, volume: volume_pb2.VolumeRef) -> tuple[Pool, BlockReader]:
        """Return a new reader. Blocks. Raises Refused, ProviderError."""
        return self._ask(self._open(group_id, volume))

    def detach(self, export: Export, group_id: str, pool: str, hold: Hold) -> None:
        """Say that an export is closed."""
        self._given.discard(export)

        def detached() -> None:
            self._attached[pool] -= 1
            if not self._attached[pool]:
                del self._attached[pool]  # clients choose the names
            self.core.readers.returned(group_id, hold)

        with suppress(RuntimeError):  # the loop is closed: the process ends
            self._loop.call_soon_threadsafe(detached)

    async def _admit(self, group_id: str, pool: str, hold: Hold) -> None:
        most = self.core.limits.nbd_connections
        if self._attached[pool] >= most:
            raise Refused("LIMIT_EXCEEDED", f"pool {pool} has {most} NBD connections already", pool=pool)
        self._attached[pool] += 1
        # before the state is looked at: a deletion that begins meanwhile finds us
        self.core.readers.borrowed(group_id, hold)

    async def _open(self, group_id: str, volume: volume_pb2.VolumeRef) -> tuple[Pool, BlockReader]:
        group = await taking.found(self.core, group_id)
        pool = streaming.readable(self.core, group, volume)
        return pool, await pool.reader(group_id, volume.volume)

    def _busy(self, pool: str) -> int:
        """Return how many connections of a pool are in the storage now. Costs the reads nothing."""
        return sum(export.busy and export.pool == pool for export in list(self._given))

    def _ask(self, question: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(question, self._loop).result()
        except RuntimeError:
            question.close()  # the loop is closed
            raise Refused("POOL_UNAVAILABLE", "the gateway stops") from None


class Export:
    """One member for one connection; belongs to the connection's thread. Use close() at the end."""

    def __init__(self, exports: Exports, name: str, group_id: str, volume: volume_pb2.VolumeRef, hold: Hold) -> None:
        """Take what attach() has found; nothing is open yet."""
        self.name = name
        self.pool = volume.pool
        self.size_bytes = 0
        self._exports = exports
        self._group_id = group_id
        self._volume = volume
        self._hold = hold
        self._reader: BlockReader | None = None
        self._scanned: tuple[int, list[tuple[int, int]]] = (0, [])
        self.busy = False

    def open(self) -> BlockReader:
        """Return the reader, opened when there is none. Raises Refused, ProviderError."""
        if self._reader is None:
            _, self._reader = self._exports.open(self._group_id, self._volume)
            self.size_bytes = self._reader.size_bytes
        return self._reader

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes of a range within size_bytes. Raises Refused, ProviderError."""
        return self._call(lambda reader: reader.read(offset, length))

    def status(self, offset: int, length: int, most: int) -> list[tuple[int, int]]:
        """Return at least one (length, State) from an offset on, for no more than `length` bytes and `most` ranges.

        What was looked up is kept: clients ask for one range after the other. Raises Refused, ProviderError.
        """
        begin, ranges = self._scanned
        if not begin <= offset < begin + sum(size for size, _ in ranges):
            end = min(self.size_bytes, offset + max(length, 1), offset + _SCAN_BYTES)
            ranges = self._call(lambda reader: allocation(reader.extents(offset, end - offset), offset, end))
            begin = offset
            self._scanned = (begin, ranges)
        return list(islice(_from(ranges, offset - begin, length), most))

    def release(self) -> None:
        """Close the reader until it is needed again."""
        if self._reader is not None:
            reader, self._reader = self._reader, None
            reader.close()

    def close(self) -> None:
        """Close everything."""
        try:
            self.release()
        finally:
            self._exports.detach(self, self._group_id, self._volume.pool, self._hold)

    def _call(self, verb: Callable[[BlockReader], T]) -> T:
        reader = self.open()
        self.busy = True
        try:
            return verb(reader)
        except BaseException:
            self.release()  # the storage may have been away: the next one opens anew
            raise
        finally:
            self.busy = False


def name_of(group_id: str, volume: volume_pb2.VolumeRef) -> str:
    """Return a member's name as an export."""
    return f"{group_id}/{volume.pool}/{volume.volume}"


def allocation(extents: Iterable[Extent], offset: int, end: int) -> list[tuple[int, int]]:
    """Return (length, State) from an offset on, up to `end` or less when there are very many."""
    found: list[tuple[int, int]] = []
    position = offset

    def add(until: int, state: int) -> None:
        nonlocal position
        length = until - position
        if length <= 0:
            return
        if found and found[-1][1] == state:
            length += found.pop()[0]
        found.append((length, state))
        position = until

    for extent in extents:
        add(extent.offset, _HOLE)
        add(extent.offset + extent.length, State.DATA)
        if len(found) >= _SCAN_EXTENTS:
            return found
    add(end, _HOLE)
    return found


def _from(ranges: list[tuple[int, int]], skip: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield ranges without the first `skip` bytes, and no more than `length`."""
    for size, state in ranges:
        if skip >= size:
            skip -= size
            continue
        part = min(size - skip, length)
        if part <= 0:
            return
        yield part, state
        length -= part
        skip = 0


def _parts(name: str) -> tuple[str, str, str]:
    parts = name.split("/", 2)
    if len(parts) != 3:
        raise Refused("GROUP_SNAPSHOT_NOT_FOUND", "exports are named GROUP_SNAPSHOT/POOL/VOLUME")
    group_id, pool, volume = parts
    return group_id, pool, volume
