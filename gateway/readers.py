"""Members kept open between reads: opening one may start a qemu-nbd or open an image in a cluster.

A reader is lent to one call at a time. It comes back only from calls that ended well, is closed when nobody wanted
it for IDLE_S, and before its snapshot is deleted; one that is lent then does not come back, as another snapshot may get
the id. Who has readers of his own for longer (an NBD connection) says so
by a Hold, and is asked to end then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gateway.pools import Pool
from providers.base import BlockReader

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


@dataclass(eq=False)
class _Lent:
    """A call that has a reader; `forgotten` when its snapshot was deleted meanwhile."""

    group_id: str
    forgotten: bool = False


@dataclass
class Readers:
    """The idle readers of a gateway. All of it belongs to the event loop."""

    timeout_s: float
    _idle: dict[Key, list[_Idle]] = field(default_factory=dict)
    _lent: set[_Lent] = field(default_factory=set)
    _closing: set[asyncio.Task[None]] = field(default_factory=set)
    _holds: dict[str, set[Hold]] = field(default_factory=dict)

    @asynccontextmanager
    async def lend(self, pool: Pool, group_id: str, volume: str) -> AsyncIterator[BlockReader]:
        """Give a reader of a member. Raises what the provider's open() raises, TimedOut."""
        key = (pool.name, group_id, volume)
        lent = _Lent(group_id)
        # before there is a reader: a deletion that begins while it is opened finds us
        self._lent.add(lent)
        try:
            reader = await self._taken(key, pool)
            try:
                yield reader
            except BaseException:
                # a thread may still be in there, or the storage is away: not for the next one
                await pool.read.run(self.timeout_s, reader.close)
                raise
        finally:
            self._lent.discard(lent)
        if lent.forgotten or sum(map(len, self._idle.values())) >= _MOST_IDLE:
            await pool.read.run(self.timeout_s, reader.close)
            return
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
        """Close the idle readers of a group snapshot, or all, and end whoever holds some.

        Does not wait longer than the deadline for those who hang in a storage.
        """
        for lent in self._lent:
            lent.forgotten = lent.forgotten or group_id in (None, lent.group_id)
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
