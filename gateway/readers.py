"""Members kept open between reads: opening one may start a qemu-nbd or open an image in a cluster.

A reader is lent to one call at a time. It comes back only from calls that ended well, is closed when nobody wanted
it for IDLE_S, and before its snapshot is deleted. One that is lent then is taken away: a storage may read on, and give
what the volume has now. Who has readers of his own for longer (an NBD connection) says so
by a Hold, and is asked to end then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from gateway import states
from gateway.pools import Pool
from providers.base import BlockReader, PoolUnavailable

T = TypeVar("T")

IDLE_S = 5.0
_MOST_IDLE = 32

Key = tuple[str, str, str]


@dataclass
class _Idle:
    """A reader nobody uses, and what will close it."""

    pool: Pool
    reader: BlockReader
    closing: asyncio.TimerHandle


@dataclass(eq=False)
class Hold:
    """Somebody who reads a snapshot for long. `end` asks him to stop, from any thread; he says when he has."""

    end: Callable[[], None]
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Lent:
    """A reader for one call. All of it belongs to the event loop."""

    def __init__(self, pool: Pool, group_id: str, timeout_s: float) -> None:
        """Begin without a reader; `timeout_s` is for closing it, and for waiting for who is in there."""
        self.group_id = group_id
        self.size_bytes = 0
        self.forgotten = False
        self._pool = pool
        self._timeout_s = timeout_s
        self._reader: BlockReader | None = None
        self._unused = asyncio.Event()

    async def run(self, timeout_s: float | None, verb: Callable[[BlockReader], T]) -> T:
        """Do something with the reader in a thread.

        Raises what it raises, TimedOut, and Refused STATE_INVALID when the snapshot is being deleted.
        """
        loop = asyncio.get_running_loop()
        reader = self._reader
        if self.forgotten or reader is None:
            raise states.unreadable(self.group_id, states.DELETING)

        def work() -> T:
            try:
                return verb(reader)
            finally:
                # also when nobody waits for us any more
                loop.call_soon_threadsafe(self._unused.set)

        self._unused.clear()
        try:
            found = await self._pool.read.run(timeout_s, work)
        except PoolUnavailable:
            self._unused.set()  # it may not have come to a thread
            raise
        if self.forgotten:
            raise states.unreadable(self.group_id, states.DELETING)
        return found

    def give(self, reader: BlockReader) -> None:
        """Take the reader."""
        self._reader = reader
        self.size_bytes = reader.size_bytes
        self._unused.set()

    def keep(self) -> BlockReader | None:
        """Return the reader, which is not ours any more, or None when it was taken away."""
        reader, self._reader = self._reader, None
        return reader

    async def take_away(self) -> None:
        """Have the call fail, wait for who is in the reader, within the deadline, and close it."""
        self.forgotten = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._unused.wait(), self._timeout_s)
        await self.close()

    async def close(self) -> None:
        """Close the reader, if there is one."""
        self._unused.set()
        if reader := self.keep():
            await self._pool.read.run(self._timeout_s, reader.close)


@dataclass
class Readers:
    """The idle readers of a gateway. All of it belongs to the event loop."""

    timeout_s: float
    _idle: dict[Key, list[_Idle]] = field(default_factory=dict)
    _lent: set[Lent] = field(default_factory=set)
    _closing: set[asyncio.Task[None]] = field(default_factory=set)
    _holds: dict[str, set[Hold]] = field(default_factory=dict)

    @asynccontextmanager
    async def lend(self, pool: Pool, group_id: str, volume: str) -> AsyncIterator[Lent]:
        """Give a reader of a member. Raises what the provider's open() raises, TimedOut, Refused."""
        key = (pool.name, group_id, volume)
        lent = Lent(pool, group_id, self.timeout_s)
        # before there is a reader: a deletion that begins while it is opened finds us
        self._lent.add(lent)
        try:
            lent.give(await self._taken(key, pool))
            yield lent
        except BaseException:
            # a thread may still be in there, or the storage is away: not for the next one
            await lent.close()
            raise
        finally:
            self._lent.discard(lent)
        if lent.forgotten or sum(map(len, self._idle.values())) >= _MOST_IDLE:
            await lent.close()
        elif reader := lent.keep():
            closing = asyncio.get_running_loop().call_later(IDLE_S, self._expired, key, reader)
            self._idle.setdefault(key, []).append(_Idle(pool, reader, closing))

    async def _taken(self, key: Key, pool: Pool) -> BlockReader:
        """Return an idle reader, or a new one."""
        if waiting := self._idle.get(key):
            idle = waiting.pop()
            idle.closing.cancel()
            return idle.reader
        _, group_id, volume = key
        return await pool.reader(group_id, volume)

    def borrowed(self, group_id: str, hold: Hold) -> None:
        """Note somebody who has readers of his own of a group snapshot, or will have."""
        self._holds.setdefault(group_id, set()).add(hold)

    def returned(self, group_id: str, hold: Hold) -> None:
        """Note that he has closed them."""
        hold.ended.set()
        holds = self._holds.get(group_id, set())
        holds.discard(hold)
        if not holds:
            self._holds.pop(group_id, None)

    async def forget(self, group_id: str | None = None) -> None:
        """Close the readers of a group snapshot, or all: the idle ones, the lent ones, and those that somebody holds.

        Does not wait longer than the deadline for those who hang in a storage.
        """
        await asyncio.gather(*(lent.take_away() for lent in self._lent if group_id in (None, lent.group_id)))
        holds = [hold for key, some in self._holds.items() if group_id in (None, key) for hold in some]
        for hold in holds:
            hold.end()
        if holds:
            waiting = [asyncio.ensure_future(hold.ended.wait()) for hold in holds]
            _, hanging = await asyncio.wait(waiting, timeout=self.timeout_s)
            for task in hanging:
                task.cancel()
        for key in [key for key in self._idle if group_id in (None, key[1])]:
            for idle in self._idle.pop(key, []):
                idle.closing.cancel()
                await idle.pool.read.run(self.timeout_s, idle.reader.close)

    def _expired(self, key: Key, reader: BlockReader) -> None:
        left = self._idle.get(key, [])
        for idle in [idle for idle in left if idle.reader is reader]:
            left.remove(idle)
            task = asyncio.get_running_loop().create_task(idle.pool.read.run(self.timeout_s, reader.close))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        if not left:
            self._idle.pop(key, None)
