"""Readers that a slow storage opens after nobody waits for them any more."""

import asyncio
import threading
from unittest import mock

import pytest

from gateway.config import Limits
from gateway.pools import Pool, TimedOut
from gateway.readers import Readers
from providers.base import BlockReader, Provider

PATIENCE_S = 60


class SlowStorage:
    """A provider whose open() comes back when it is let go; what it opened says when it is closed."""

    def __init__(self) -> None:
        self.asked, self.let_go, self.closed = threading.Event(), threading.Event(), threading.Event()
        self.reader = mock.create_autospec(BlockReader, instance=True)
        self.reader.close.side_effect = self.closed.set
        provider = mock.create_autospec(Provider, instance=True)
        provider.open.side_effect = self._open
        self.pool = Pool("p", "slow", provider, Limits(call_timeout_s=0.1))

    def _open(self, group_id: str, volume: str) -> BlockReader:
        self.asked.set()
        assert self.let_go.wait(PATIENCE_S)
        return self.reader  # type: ignore[no-any-return]


async def borrow(storage: SlowStorage) -> None:
    async with Readers(timeout_s=PATIENCE_S).lend(storage.pool, "group", "volume"):
        raise AssertionError("there is no reader yet")


async def come_late(storage: SlowStorage) -> bool:
    assert not storage.closed.is_set()
    storage.let_go.set()
    return await asyncio.to_thread(storage.closed.wait, PATIENCE_S)


def test_a_reader_that_opens_after_the_deadline_is_closed() -> None:
    async def work() -> None:
        storage = SlowStorage()
        with pytest.raises(TimedOut):
            await borrow(storage)
        assert await come_late(storage)
        storage.pool.close()

    asyncio.run(work())


def test_a_reader_that_opens_when_its_caller_has_gone_is_closed() -> None:
    async def work() -> None:
        storage = SlowStorage()
        storage.pool.limits = Limits(call_timeout_s=PATIENCE_S)
        caller = asyncio.create_task(borrow(storage))
        assert await asyncio.to_thread(storage.asked.wait, PATIENCE_S)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert await come_late(storage)
        storage.pool.close()

    asyncio.run(work())
