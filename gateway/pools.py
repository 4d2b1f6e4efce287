"""The pools and how their providers are called: bounded threads and deadlines, per pool and kind of work.

A storage that hangs holds its own threads and nobody else's. When all threads of a lane hang, further calls
are refused at once instead of queueing behind them. Cuts have a lane of their own: they never wait behind a
copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import structlog

from gateway.config import Limits, PoolConfig
from gateway.errors import Refused
from gateway.metrics import BUSY_THREADS
from providers.base import BlockReader, PoolUnavailable, Provider, ProviderError

T = TypeVar("T")
_log = structlog.get_logger()


class TimedOut(Refused):
    """The storage did not answer in time. `ended` is done when the call has come back after all."""

    def __init__(self, pool: str, timeout_s: float, ended: asyncio.Future[Any]) -> None:
        """Take the call that goes on."""
        super().__init__("POOL_TIMEOUT", f"pool {pool}: the storage did not answer within {timeout_s:g} s", pool=pool)
        self.ended = ended


class Lane:
    """A bounded thread pool for one kind of work in one pool."""

    def __init__(self, pool: str, name: str, threads: int, queue: int) -> None:
        """Take the number of threads and of calls that may wait for one."""
        self._pool = pool
        self._name = name
        self._limit = threads + queue
        self._busy = BUSY_THREADS.labels(pool=pool, lane=name)
        self._under_way = 0
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"{pool}-{name}")

    async def run(self, timeout_s: float | None, verb: Callable[[], T], late: Callable[[T], None] | None = None) -> T:
        """Run a provider's verb in a thread and wait for it.

        What it returns when nobody waits any more (too late, or the caller was cancelled) is given to `late`, in a
        thread too. Raises what the verb raises; PoolUnavailable when every thread is taken; TimedOut when it is not
        back after `timeout_s` (the thread cannot be stopped: TimedOut.ended tells when it comes back after all).
        """
        if self._under_way >= self._limit:
            raise PoolUnavailable(
                f"pool {self._pool}: {self._under_way} calls are under way or hang in the storage", pool=self._pool
            )
        self._under_way += 1
        self._busy.inc()
        loop = asyncio.get_running_loop()
        call = self._executor.submit(self._named, verb)
        waiting = asyncio.wrap_future(call, loop=loop)
        waiting.add_done_callback(self._done)
        taken = False
        try:
            await asyncio.wait({waiting}, timeout=timeout_s)
            taken = waiting.done()
        finally:
            if late and not taken:
                waiting.add_done_callback(partial(self._late, late))
        if taken:
            return waiting.result()
        raise TimedOut(self._pool, timeout_s or 0, waiting)

    def _named(self, verb: Callable[[], T]) -> T:
        """Run the verb; its errors name the pool."""
        try:
            return verb()
        except ProviderError as error:
            error.metadata.setdefault("pool", self._pool)
            raise

    def close(self) -> None:
        """Refuse further work; what hangs is left to the end of the process."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _late(self, late: Callable[[T], None], waiting: asyncio.Future[T]) -> None:
        if not waiting.cancelled() and waiting.exception() is None:
            with suppress(RuntimeError):  # the lane is closed: the process ends
                self._executor.submit(late, waiting.result())

    def _done(self, waiting: asyncio.Future[T]) -> None:
        self._under_way -= 1
        self._busy.dec()
        if not waiting.cancelled():
            waiting.exception()  # seen: a call that nobody waits for any more is no unhandled error


@dataclass
class Pool:
    """One configured pool: its provider and the lanes in which it is called."""

    name: str
    kind: str
    provider: Provider
    limits: Limits
    query: Lane = field(init=False)
    cut: Lane = field(init=False)
    work: Lane = field(init=False)
    read: Lane = field(init=False)

    def __post_init__(self) -> None:
        """Make the lanes."""
        threads = self.limits.threads
        self.query = Lane(self.name, "query", threads, 256)
        self.cut = Lane(self.name, "cut", threads, 256)
        self.work = Lane(self.name, "work", threads, 100_000)
        self.read = Lane(self.name, "read", self.limits.read_streams, 0)

    async def ask(self, verb: Callable[[], T]) -> T:
        """Run a quick verb with the configured deadline."""
        return await self.query.run(self.limits.call_timeout_s, verb)

    async def reader(self, group_id: str, volume: str) -> BlockReader:
        """Open a reader with the configured deadline. One that opens later is closed when it comes."""
        return await self.query.run(
            self.limits.call_timeout_s, lambda: self.provider.open(group_id, volume), late=_close
        )

    def close(self) -> None:
        """Close lanes and provider."""
        for lane in (self.query, self.cut, self.work, self.read):
            lane.close()
        self.provider.close()


def _close(reader: BlockReader) -> None:
    """Close a reader that nobody has."""
    try:
        reader.close()
    except Exception as error:
        _log.warning("reader_not_closed", error=str(error))


class Pools:
    """All pools by name."""

    def __init__(self, configured: dict[str, PoolConfig], limits: Limits) -> None:
        """Open every provider; a storage that is away does not hinder it."""
        self._pools = {
            name: Pool(name, pool.kind, pool.provider.open_pool(name, pool.options), limits)
            for name, pool in sorted(configured.items())
        }

    def all(self) -> list[Pool]:
        """Return the pools by name."""
        return list(self._pools.values())

    def get(self, name: str) -> Pool:
        """Return one pool or raise Refused POOL_NOT_FOUND."""
        try:
            return self._pools[name]
        except KeyError:
            raise Refused("POOL_NOT_FOUND", f"there is no pool {name!r}; see ListPools", pool=name) from None

    def close(self) -> None:
        """Close every pool."""
        for pool in self._pools.values():
            pool.close()
