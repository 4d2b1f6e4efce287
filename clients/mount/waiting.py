"""Waiting for one thing at a time without the event loop, which costs more than most answers take to come.

A reader at random is a chain: the kernel's request, our question, its answer, our reply, the next request. While that
chain is all there is, a bare poll(2) of a few milliseconds does what a round through the scheduler would. Whatever else
there is to do (another request, an answer in a thread) sends us back to the event loop.
"""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import pyfuse3
import trio

_POLL_MS = 2
_IN_A_ROW = 512


class HasFileno(Protocol):
    """A socket, for instance."""

    def fileno(self) -> int:
        """Return the descriptor."""


class Waiting:
    """Who waits in one mount. All of it belongs to the event loop's thread."""

    def __init__(self) -> None:
        """Nobody waits."""
        self._busy = 0
        self._in_a_row = 0
        self._session: int | None = None

    def install(self) -> None:
        """Have pyfuse3 wait for requests by for_request(). It takes its trio from there, as pyfuse3.asyncio does."""
        pyfuse3.trio = _Trio(self)  # type: ignore[attr-defined]

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Note that a request waits in the event loop."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    async def for_request(self, session: int) -> None:
        """Wait until the kernel has a request."""
        self._session = session
        if not await self._alone() or not _polled(session, None):
            await trio.lowlevel.wait_readable(session)

    async def for_answer(self, source: HasFileno) -> None:
        """Wait until something becomes readable; a request that comes first is served meanwhile."""
        number = source.fileno()
        if await self._alone() and _polled(number, self._session):
            return
        with self.elsewhere():
            await trio.lowlevel.wait_readable(number)

    async def turn(self, lock: trio.Lock) -> None:
        """Acquire a lock."""
        try:
            lock.acquire_nowait()
        except trio.WouldBlock:
            with self.elsewhere():
                await lock.acquire()

    async def let_others(self) -> None:
        """Let the requests that are there be served first."""
        if not await self._alone() or (self._session is not None and _polled(self._session, None, 0)):
            with self.elsewhere():
                await trio.lowlevel.checkpoint()

    async def _alone(self) -> bool:
        """Tell whether nothing else is to be done; signals and timers have their turn now and then."""
        if self._busy:
            return False
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            self._in_a_row = 0
            await trio.lowlevel.checkpoint()
        return not self._busy


class _Trio:
    """The trio module, with a wait_readable() and a Lock of ours."""

    def __init__(self, waiting: Waiting) -> None:
        self.lowlevel = _Lowlevel(waiting)
        self.Lock = _Lock

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


class _Lowlevel:
    """trio.lowlevel, likewise."""

    def __init__(self, waiting: Waiting) -> None:
        self.wait_readable = waiting.for_request

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)


class _Lock:
    """A lock that its last owner may have again at once; trio's own makes the tasks take turns."""

    def __init__(self) -> None:
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiting.park()
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        self._held = False
        self._waiting.unpark()


def _polled(wanted: int, other: int | None, timeout_ms: int = _POLL_MS) -> bool:
    """Tell whether a descriptor becomes readable in time, and before another one."""
    return any(number == wanted for number, _ in _poll(wanted, other).poll(timeout_ms))


@lru_cache(maxsize=256)
def _poll(*descriptors: int | None) -> select.poll:
    """Return what waits for descriptors. It knows their numbers only, so that it can be kept when they are reused."""
    poll = select.poll()
    for descriptor in descriptors:
        if descriptor is not None:
            poll.register(descriptor, select.POLLIN)
    return poll


waiting = Waiting()
"""The one of this process, which has one mount: so does pyfuse3."""
