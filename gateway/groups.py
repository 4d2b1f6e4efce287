"""What the gateway holds in memory of group snapshots that something is being done with.

One lock a group (work on the same id is done one after the other), the job in the background, its progress,
who watches, and which volumes are taken. All of it belongs to the event loop, but for the progress that a
provider's thread reports.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from frostgate.v1 import group_snapshot_pb2 as pb
from gateway.config import Limits
from gateway.errors import Refused
from gateway.journal import Group, Journal
from gateway.pools import Pool, Pools
from gateway.readers import Readers
from providers.base import Attachment, Cancelled, ReportProgress, VolumeSpec

T = TypeVar("T")

log = structlog.get_logger()

_NOTIFY_EVERY_S = 0.2


class Live:
    """A group snapshot that somebody works on or watches."""

    def __init__(self, group_id: str, loop: asyncio.AbstractEventLoop) -> None:
        """Nothing is under way yet."""
        self.id = group_id
        self.lock = asyncio.Lock()
        self.job: asyncio.Task[None] | None = None
        self.prepared: Group | None = None
        self.cancel = threading.Event()
        self.watchers: set[asyncio.Event] = set()
        self._expiry: asyncio.TimerHandle | None = None
        self._loop = loop
        self._progress: dict[str, tuple[int, int]] = {}
        self._notified = 0.0

    def begin(self) -> None:
        """Forget the progress and cancellation of the job before."""
        self.cancel = threading.Event()
        self._progress.clear()

    def reporter(self, pool: str) -> ReportProgress:
        """Return what a provider's thread reports to; it raises Cancelled once the job is cancelled."""
        cancel = self.cancel

        def report(done_bytes: int, total_bytes: int) -> None:
            if cancel.is_set():
                raise Cancelled("given up: the group snapshot is being deleted, or the gateway stops")
            self._progress[pool] = (done_bytes, total_bytes)
            now = time.monotonic()
            if now - self._notified >= _NOTIFY_EVERY_S:
                self._notified = now
                self._loop.call_soon_threadsafe(self.notify)

        return report

    def progress(self) -> pb.Progress | None:
        """Return the progress over all pools, or None when nothing was reported."""
        parts = list(self._progress.values())
        if not parts:
            return None
        return pb.Progress(done_bytes=sum(done for done, _ in parts), total_bytes=sum(total for _, total in parts))

    def notify(self) -> None:
        """Wake everybody who watches."""
        for watcher in self.watchers:
            watcher.set()

    def expire_in(self, delay_s: float, expired: Callable[[], object]) -> None:
        """Call `expired` after a while, unless keep() comes first."""
        self.keep()
        self._expiry = self._loop.call_later(delay_s, expired)

    def keep(self) -> None:
        """Stop the clock: it does not expire."""
        if self._expiry:
            self._expiry.cancel()
            self._expiry = None


class Claims:
    """Which volumes are taken: shared by snapshots being made, exclusively by a revert."""

    def __init__(self) -> None:
        """Nothing is taken."""
        self._owners: dict[tuple[str, str], dict[str, bool]] = {}

    def take(self, owner: str, volumes: Iterable[tuple[str, str]], *, exclusive: bool) -> None:
        """Take volumes or raise Refused VOLUME_BUSY; taking again what one has is fine."""
        volumes = list(volumes)
        for pool, volume in volumes:
            for other, others_exclusive in self._owners.get((pool, volume), {}).items():
                if other != owner and (exclusive or others_exclusive):
                    raise Refused(
                        "VOLUME_BUSY",
                        f"volume {pool}/{volume} is being worked on for group snapshot {other}; try again later",
                        pool=pool,
                        volume=volume,
                        group_snapshot=other,
                    )
        for key in volumes:
            self._owners.setdefault(key, {})[owner] = exclusive

    def release(self, owner: str) -> None:
        """Give back all that the owner took."""
        for key in [key for key, owners in self._owners.items() if owners.pop(owner, None) is not None]:
            if not self._owners[key]:
                del self._owners[key]


@dataclass
class Core:
    """What every verb needs: journal, pools, and the group snapshots in memory."""

    journal: Journal
    pools: Pools
    limits: Limits
    claims: Claims = field(default_factory=Claims)
    readers: Readers = field(init=False)
    stopping: bool = False
    nbd_socket: Path | None = None
    _live: WeakValueDictionary[str, Live] = field(default_factory=WeakValueDictionary)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Begin with nothing open."""
        self.readers = Readers(self.limits.call_timeout_s)

    def live(self, group_id: str) -> Live:
        """Return what is in memory of a group, made when there is nothing."""
        live = self._live.get(group_id)
        if live is None:
            live = self._live[group_id] = Live(group_id, asyncio.get_running_loop())
        return live

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something that no client's cancellation can stop."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def exclusive(self, group_id: str, work: Callable[[Live], Awaitable[T]]) -> T:
        """Run work on a group while nobody else works on it; it goes on when the client goes away."""
        live = self.live(group_id)

        async def locked() -> T:
            async with live.lock:
                return await work(live)

        return await asyncio.shield(self.spawn(locked()))

    async def drain(self, timeout_s: float) -> None:
        """Wait for what is under way; then cancel the jobs, which the next start resumes."""
        self.stopping = True
        pending = {task for task in self._tasks if task is not asyncio.current_task()}
        if pending:
            await asyncio.wait(pending, timeout=timeout_s)
        for live in list(self._live.values()):
            live.keep()
            live.cancel.set()
        pending = {task for task in self._tasks if not task.done()}
        if pending:
            await asyncio.wait(pending, timeout=2)
        await self.readers.forget()

    async def in_pools(self, group: Group, verb: Callable[[Pool], Awaitable[T]]) -> dict[str, T | BaseException]:
        """Run a verb in every pool of a group at once; return each pool's result or error."""
        names = sorted({member.volume.pool for member in group.snapshot.members})

        async def run(name: str) -> T:
            return await verb(self.pools.get(name))

        results = await asyncio.gather(*(run(name) for name in names), return_exceptions=True)
        return dict(zip(names, results, strict=True))

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it got it


def first_error(results: dict[str, Any]) -> Exception | None:
    """Return the error of the first pool that failed, or None."""
    for result in results.values():
        if isinstance(result, Exception):
            return result
    return None


def volumes_of(group: Group, pool: str) -> tuple[VolumeSpec, ...]:
    """Return a pool's share of a group's volumes."""
    return tuple(
        VolumeSpec(volume.ref.volume, volume.format or None, _attachment(volume))
        for volume in group.spec.volumes
        if volume.ref.pool == pool
    )


def _attachment(volume: pb.VolumeSpec) -> Attachment | None:
    if not volume.HasField("attachment"):
        return None
    given = volume.attachment
    return Attachment(given.hypervisor, given.domain, given.disk)


def now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)


def stamp(after_s: float = 0) -> Timestamp:
    """Return the time, or a time to come, as the contract has it."""
    timestamp = Timestamp()
    timestamp.FromDatetime(now() + timedelta(seconds=after_s))
    return timestamp
