"""Deleting and undoing: what leaves no trace, however often the gateway or the storage dies on the way.

DELETING is written first. The work is repeated, with growing pauses, until every pool has done it; then the
row goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception, wait_exponential

from frostgate.v1 import group_snapshot_pb2 as pb
from gateway import records, states
from gateway.errors import Refused
from gateway.groups import Core, Live, first_error, log
from gateway.journal import Group
from gateway.metrics import UNDONE
from gateway.pools import Pool, TimedOut
from providers.base import Cancelled, PoolUnavailable, ProviderError, SnapshotInUse


async def delete(core: Core, group_id: str) -> pb.GroupSnapshot | None:
    """Begin to delete a group in any state; None when there is nothing to delete. Repeatable.

    Raises Refused OPERATION_PENDING while it is being reverted to, SnapshotInUse while the storage needs it.
    """

    async def work(live: Live) -> pb.GroupSnapshot | None:
        group = await core.journal.get(group_id)
        if group is None:
            return None
        if group.snapshot.state == states.REVERTING:
            raise Refused(
                "OPERATION_PENDING",
                f"volumes are being reverted to group snapshot {group_id}; delete it when that is done",
                group_snapshot=group_id,
            )
        if group.snapshot.state != states.DELETING:
            if group.snapshot.state == states.READY:
                await _check_deletable(core, group)
            await _mark(core, live, group)
            live.job = core.spawn(_remove(core, live, group, live.job))
        return group.snapshot

    return await core.exclusive(group_id, work)


async def _check_deletable(core: Core, group: Group) -> None:
    """Raise the first pool's SnapshotInUse. A pool that does not answer does not hinder: its deletion waits."""

    async def verb(pool: Pool) -> None:
        await pool.ask(partial(pool.provider.check_deletable, group.id))

    for result in (await core.in_pools(group, verb)).values():
        if isinstance(result, SnapshotInUse):
            raise result


def delete_again(core: Core, group: Group) -> None:
    """Resume a deletion that the journal has, after the gateway restarted."""
    live = core.live(group.id)
    live.job = core.spawn(_remove(core, live, group, live.job))


async def undo(core: Core, live: Live, group: Group, why: str, results: dict[str, Any]) -> None:
    """Undo a reservation or a cut that failed; the caller holds the group's lock.

    Nothing is left when it returns, unless a storage does not answer: then it goes on in the background.
    """
    UNDONE.labels(why=why).inc()
    error = first_error(results)
    ordinary = isinstance(error, ProviderError | Refused) and not isinstance(error, PoolUnavailable | TimedOut)
    (log.info if ordinary else log.warning)("undone", group=group.id, why=why, error=str(error))
    live.keep()
    live.prepared = None
    await _mark(core, live, group)
    hanging = [result.ended for result in results.values() if isinstance(result, TimedOut)]
    if not hanging and first_error(await core.in_pools(group, lambda pool: abort(pool, group.id))) is None:
        await _forget(core, live, group)
        return
    live.job = core.spawn(_remove(core, live, group, live.job, hanging))


async def expire(core: Core, group_id: str) -> None:
    """Undo a group whose expire_time has passed, unless it was confirmed or deleted meanwhile."""

    async def work(live: Live) -> None:
        group = await core.journal.get(group_id)
        if group is None or group.snapshot.state == states.DELETING or not group.snapshot.HasField("expire_time"):
            return
        why = "reservation expired" if group.snapshot.state == states.PREPARED else "not confirmed in time"
        UNDONE.labels(why=why).inc()
        log.info("undone", group=group_id, why=why)
        live.prepared = None
        await _mark(core, live, group)
        live.job = core.spawn(_remove(core, live, group, live.job))

    try:
        await core.exclusive(group_id, work)
    except Exception as error:  # the task's edge: a journal that cannot be written now may be later
        log.error("expiry waits", group=group_id, error=str(error))
        core.live(group_id).expire_in(10, lambda: core.spawn(expire(core, group_id)))


async def _mark(core: Core, live: Live, group: Group) -> None:
    live.keep()
    live.prepared = None
    states.move(group.snapshot, states.DELETING)
    group.snapshot.ClearField("expire_time")
    relatives = await core.journal.save_deleting(group)
    live.cancel.set()
    live.notify()
    if relatives:
        core.spawn(redescribe(core, relatives))


async def _remove(
    core: Core,
    live: Live,
    group: Group,
    before: asyncio.Task[None] | None,
    hanging: Iterable[asyncio.Future[Any]] = (),
) -> None:
    """Remove a group from every pool, as often as it takes. Waits first for what is still at work on it."""
    if before:
        await asyncio.wait({before})
    if hanging:
        await asyncio.wait(set(hanging))
    live.begin()
    settled = group.snapshot.HasField("ready_time")
    was_cut = group.snapshot.HasField("cut_time")

    async def verb(pool: Pool) -> None:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(lambda error: not isinstance(error, Cancelled)),
            wait=wait_exponential(max=60),
            before_sleep=lambda state: log.warning(
                "deletion waits",
                group=group.id,
                pool=pool.name,
                error=str(state.outcome and state.outcome.exception()),
            ),
            reraise=True,
        ):
            with attempt:
                if core.stopping:
                    raise Cancelled("the gateway stops")
                if not settled:
                    await pool.work.run(None, lambda: pool.provider.abort(group.id))
                if not was_cut:
                    return  # a finished snapshot of this id on the storage is somebody else's: a lost journal's
                await core.readers.forget(group.id)
                await pool.work.run(None, lambda: pool.provider.delete(group.id, live.reporter(pool.name)))

    if error := first_error(await core.in_pools(group, verb)):
        log.info("deletion goes on at the next start", group=group.id, error=str(error))
        return
    async with live.lock:
        await _forget(core, live, group)


async def abort(pool: Pool, group_id: str) -> None:
    """Undo what a pool has of a group that was never settled. Raises what the provider raises."""
    await pool.ask(lambda: pool.provider.abort(group_id))


async def _forget(core: Core, live: Live, group: Group) -> None:
    await core.journal.remove(group.id)
    core.claims.release(group.id)
    log.info("gone", group=group.id)
    live.notify()


async def redescribe(core: Core, group_ids: Iterable[str]) -> None:
    """Write the records of groups whose place in their VM's tree changed; the journal has it already."""
    for group_id in group_ids:
        async with core.live(group_id).lock:
            group = await core.journal.get(group_id)
            if group is None or group.snapshot.state not in (states.READY, states.REVERTING):
                continue
            record = records.render(group)
            results = await core.in_pools(group, partial(describe, group_id=group_id, record=record))
            if error := first_error(results):
                log.warning("record on the storage is behind the journal", group=group_id, error=str(error))


async def describe(pool: Pool, group_id: str, record: bytes) -> None:
    """Keep a record beside the snapshot in one pool. Raises what the provider raises."""
    await pool.ask(lambda: pool.provider.describe(group_id, record))
