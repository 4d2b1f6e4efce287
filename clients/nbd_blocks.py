"""A member read by the gateway's NBD export of it, over as many connections as there are reads at a time.

What is read at random is asked for as it is. What is read in order comes in chunks, some of them asked for ahead, each
over a connection of its own, so that the storage works on them at once; holes are not asked for then.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from contextlib import suppress
from functools import partial

from clients.gateway import Gateway
from clients.nbd import MOST_BYTES, Connection, parse_uri
from clients.nbd_pool import Connections
from clients.page_cache import PageCache
from clients.patience import Away, answered, patiently
from clients.remote_blocks import allocated_bytes
from frostgate.v1 import group_snapshot_pb2 as pb

CHUNK_BYTES = 1024 * 1024
_AHEAD = 4
_IN_ORDER_BYTES = 128 * 1024
_READS_NOTED = 32
_WINDOW_BYTES = 256 * CHUNK_BYTES
_STATUS_CALLS = 16
_ZEROS = bytes(CHUNK_BYTES)


class NbdBlocks:
    """A member by NBD. Thread-safe."""

    fetches = False

    def __init__(self, gateway: Gateway, snapshot: pb.GroupSnapshot, member: pb.Member, cache: PageCache) -> None:
        """Connect. Raises Away, OSError."""
        self._gateway = gateway
        self._snapshot_id = snapshot.id
        self._cut_time = snapshot.cut_time
        self._volume = member.volume
        self._cache = cache
        self._key = (member.nbd_uri, snapshot.cut_time.ToNanoseconds())
        try:
            self._connections = Connections(*parse_uri(member.nbd_uri), self._check)
        except ValueError as error:
            raise OSError(str(error)) from None
        self._ahead: OrderedDict[int, Connection] = OrderedDict()
        self._asking: set[int] = set()
        self._receiving: set[int] = set()
        self._in_order: OrderedDict[int, int] = OrderedDict()
        self._holes: dict[int, frozenset[int]] = {}
        self._allocated: int | None = None
        self._changed = threading.Condition()
        first = self._connections.take()
        self.size_bytes = first.size_bytes
        self._connections.give(first)

    def read(self, offset: int, length: int) -> bytes:
        """See Blocks."""
        length = max(0, min(length, self.size_bytes - offset))
        if not length:
            return b""
        work = self._chunks if self._goes_on(offset, length) else self._exactly
        return patiently(partial(work, offset, length), self._snapshot_id, self._volume.volume)

    def at_once(self, offset: int, length: int) -> bytes | None:
        """See Blocks."""
        length = max(0, min(length, self.size_bytes - offset))
        number, begin = divmod(offset, CHUNK_BYTES)
        if begin + length > CHUNK_BYTES:
            return None
        chunk = self._kept(number)
        if chunk is None:
            return None
        self._goes_on(offset, length)
        return chunk[begin : begin + length]

    def begin(self, offset: int, length: int) -> Asked | None:
        """See Blocks. Reads in order are not for this, nor are reads while every connection is busy."""
        length = max(0, min(length, self.size_bytes - offset))
        if not length or length > _IN_ORDER_BYTES or self._continues(offset, length):
            return None
        connection = self._connections.take_idle()
        if connection is None:
            return None
        self._goes_on(offset, length)
        try:
            connection.ask(offset, length)
        except Away:
            self._lost(connection)
            return None
        return Asked(self, connection)

    def descriptor(self) -> None:
        """See Blocks."""

    def allocated_bytes(self) -> int:
        """See Blocks. Asked for once."""
        if self._allocated is None:
            self._allocated = allocated_bytes(self._gateway, self._snapshot_id, self._volume)
        return self._allocated

    def close(self) -> None:
        """See Blocks."""
        self._connections.close()
        with self._changed:
            ahead = list(self._ahead.values())
            self._ahead.clear()
        for connection in ahead:
            self._connections.drop(connection)

    def _check(self) -> None:
        """Raise OSError ESTALE when the export is another snapshot's by now, Away when nobody tells.

        Called after connecting: a snapshot that is still the one we mean was it before, and the gateway ends the
        connections of one that it deletes.
        """
        there = answered(partial(self._gateway.get, self._snapshot_id))
        if there.cut_time != self._cut_time:
            raise OSError(errno.ESTALE, "the snapshot was deleted", self._snapshot_id)

    def finished(self, connection: Connection) -> bytes:
        """Return the answer that a connection was asked for, and free it. Raises Away."""
        try:
            content = connection.answer()
        except BaseException:
            self._lost(connection)
            raise
        self._connections.give(connection)
        return content

    def abandoned(self, connection: Connection) -> None:
        """Do without an answer."""
        self._connections.drop(connection)

    def _continues(self, offset: int, length: int) -> bool:
        """Tell whether a read goes on where earlier ones ended, and they were more than chance."""
        return self._in_order.get(offset, 0) + length >= 2 * _IN_ORDER_BYTES

    def _goes_on(self, offset: int, length: int) -> bool:
        """_continues(), and note the read."""
        with self._changed:
            run = self._in_order.pop(offset, 0) + length
            self._in_order[offset + length] = run
            while len(self._in_order) > _READS_NOTED:
                self._in_order.popitem(last=False)
        return run >= 2 * _IN_ORDER_BYTES

    def _exactly(self, offset: int, length: int) -> bytes:
        """Return a range without anything around it. Raises Away, OSError."""
        parts = []
        for start in range(offset, offset + length, MOST_BYTES):
            connection = self._connections.take()
            try:
                connection.ask(start, min(MOST_BYTES, offset + length - start))
            except BaseException:
                self._lost(connection)
                raise
            parts.append(self.finished(connection))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunks(self, offset: int, length: int) -> bytes:
        """Return a range out of chunks. Raises Away, OSError."""
        parts = []
        end = offset + length
        while offset < end:
            number, begin = divmod(offset, CHUNK_BYTES)
            part = self._chunk(number)[begin : begin + end - offset]
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk(self, number: int) -> bytes:
        """Return a chunk and have the next ones asked for. Raises Away, OSError."""
        while True:
            with self._changed:
                # another thread receives it just now
                self._changed.wait_for(lambda: number not in self._receiving)
                chunk = self._kept(number)
                if chunk is not None:
                    return chunk
                self._receiving.add(number)
                connection = self._ahead.pop(number, None)
            try:
                if connection is None and self._is_hole(number):
                    continue
                if connection is None:
                    connection = self._connections.take()
                    self._ask(connection, number)
                chunk = self.finished(connection)
                self._cache.put(self._key, number, chunk)
            finally:
                with self._changed:
                    self._receiving.discard(number)
                    self._changed.notify_all()
            # not before: who waits for a connection must not hold one
            self._ask_ahead(number + 1)
            return chunk

    def _ask_ahead(self, first: int) -> None:
        """Ask for the chunks that come next. What goes wrong is told when a chunk is wanted."""
        last = min(first + _AHEAD, -(-self.size_bytes // CHUNK_BYTES))
        for number in range(first, last):
            with self._changed:
                known = number in self._asking or number in self._ahead or number in self._receiving
                if known or self._kept(number) is not None:
                    continue
                if len(self._asking) >= _AHEAD:
                    return
                self._asking.add(number)
            try:
                with suppress(Away, OSError):
                    self._ask_one_ahead(number)
            finally:
                with self._changed:
                    self._asking.discard(number)

    def _ask_one_ahead(self, number: int) -> None:
        """Ask for a chunk. Raises Away, OSError."""
        if self._is_hole(number):
            return
        while oldest := self._one_too_many():
            other, connection = oldest
            self._cache.put(self._key, other, self.finished(connection))
        connection = self._connections.take()
        self._ask(connection, number)
        with self._changed:
            self._ahead[number] = connection

    def _one_too_many(self) -> tuple[int, Connection] | None:
        """Take out a chunk that nobody came for: a reader that stopped must not hold the connections."""
        with self._changed:
            return self._ahead.popitem(last=False) if len(self._ahead) >= _AHEAD else None

    def _ask(self, connection: Connection, number: int) -> None:
        offset = number * CHUNK_BYTES
        try:
            connection.ask(offset, min(CHUNK_BYTES, self.size_bytes - offset))
        except BaseException:
            self._lost(connection)
            raise

    def _kept(self, number: int) -> bytes | None:
        """Return a chunk that needs no asking."""
        if number in self._holes.get(number * CHUNK_BYTES // _WINDOW_BYTES, ()):
            return _ZEROS[: self.size_bytes - number * CHUNK_BYTES]
        return self._cache.get(self._key, number)

    def _is_hole(self, number: int) -> bool:
        """Tell whether a chunk is zeros; asks for what is not known of its window. Raises Away, OSError."""
        window = number * CHUNK_BYTES // _WINDOW_BYTES
        if window not in self._holes:
            connection = self._connections.take()
            try:
                self._holes[window] = self._holes_of(connection, window)
            except BaseException:
                self._lost(connection)
                raise
            self._connections.give(connection)
        return number in self._holes[window]

    def _holes_of(self, connection: Connection, window: int) -> frozenset[int]:
        """Return which chunks of a window are zeros. A window in very many pieces is not looked at to its end."""
        holes: set[int] = set()
        offset = window * _WINDOW_BYTES
        end = min(offset + _WINDOW_BYTES, self.size_bytes)
        zeros_from: int | None = None
        for _ in range(_STATUS_CALLS):
            for length, zero in connection.status(offset, end - offset):
                if zero and zeros_from is None:
                    zeros_from = offset
                if not zero:
                    holes.update(self._whole_chunks(zeros_from, offset))
                    zeros_from = None
                offset += length
            if offset >= end:
                break
        holes.update(self._whole_chunks(zeros_from, min(offset, end)))
        return frozenset(holes)

    def _whole_chunks(self, begin: int | None, end: int) -> range:
        if begin is None:
            return range(0)
        last = -(-end // CHUNK_BYTES) if end == self.size_bytes else end // CHUNK_BYTES
        return range(-(-begin // CHUNK_BYTES), last)

    def _lost(self, connection: Connection) -> None:
        """Drop a connection that broke, and the others with it: the gateway may have been started anew."""
        self._connections.drop(connection)
        self._connections.hang_up()
        with self._changed:
            ahead = list(self._ahead.values())
            self._ahead.clear()
        for other in ahead:
            self._connections.drop(other)


class Asked:
    """A read under way; see Pending."""

    def __init__(self, blocks: NbdBlocks, connection: Connection) -> None:
        """Take the connection that was asked."""
        self._blocks = blocks
        self._connection: Connection | None = connection
        self.fileno = connection.fileno

    def finish(self) -> bytes:
        """See Pending."""
        connection, self._connection = self._connection, None
        if connection is None:
            raise Away("it was finished")
        return self._blocks.finished(connection)

    def abandon(self) -> None:
        """See Pending."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._blocks.abandoned(connection)
