"""Taking a group snapshot: prepare, cut, confirm, and settling in the background.

The journal's PREPARED row is the intent to cut, so between freeze and thaw there is one storage call per pool
(all pools at once) and one write of the outcome. Whatever fails before the outcome is written is undone in
every pool: all members or none.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_exponential

from frostgate.v1 import group_snapshot_pb2 as pb
from gateway import deleting, records, states
from gateway.errors import BadInput, Refused, failure_of
from gateway.groups import Core, Live, first_error, log, now, stamp, volumes_of
from gateway.journal import Group
from gateway.metrics import CUT_SECONDS, FAILED
from gateway.pools import Pool
from providers.base import Cancelled, GroupSpec, Member, PoolUnavailable

DEFAULT_EXPIRE_S = 60.0
SAFETY_LABEL = "frostgate/safety-of"


async def prepare(core: Core, group_id: str, spec: pb.GroupSnapshotSpec, expire_s: float) -> pb.GroupSnapshot:
    """Reserve an id and do everything that can be done before the cut; repeatable."""

    async def work(live: Live) -> pb.GroupSnapshot:
        group = await core.journal.get(group_id)
        if group:
            check_same(group, spec)
            if group.snapshot.state == states.DELETING:
                raise pending(group_id, "deleted")
            return group.snapshot
        return (await _reserve(core, live, group_id, spec, expire_s)).snapshot

    return await core.exclusive(group_id, work)


async def create(
    core: Core, group_id: str, spec: pb.GroupSnapshotSpec | None, confirm_s: float | None
) -> pb.GroupSnapshot:
    """Cut; prepare first when nobody did; repeatable. Returns once the point in time is fixed and written."""

    async def work(live: Live) -> pb.GroupSnapshot:
        group = live.prepared or await core.journal.get(group_id)
        if group is None:
            if spec is None:
                raise BadInput([("spec", "is required: no reservation holds under this id (any more)")])
            group = await _reserve(core, live, group_id, spec, DEFAULT_EXPIRE_S)
        elif spec is not None:
            check_same(group, spec)
        state = group.snapshot.state
        if state == states.PREPARED:
            await _cut(core, live, group, confirm_s)
        elif state == states.DELETING:
            raise pending(group_id, "deleted")
        elif state == states.FAILED:
            raise Refused(
                "STATE_INVALID",
                f"group snapshot {group_id} FAILED ({group.snapshot.failure.message}); delete it first",
                group_snapshot=group_id,
                state="FAILED",
            )
        return group.snapshot

    return await core.exclusive(group_id, work)


async def confirm(core: Core, group_id: str, consistency: pb.Consistency.ValueType) -> pb.GroupSnapshot:
    """Record what the caller has verified, and keep the snapshot; repeatable."""

    async def work(live: Live) -> pb.GroupSnapshot:
        group = await found(core, group_id)
        if group.snapshot.state not in (states.COPYING, states.READY, states.REVERTING):
            raise Refused(
                "STATE_INVALID",
                f"group snapshot {group_id} is {states.name(group.snapshot.state)} and cannot be confirmed",
                group_snapshot=group_id,
                state=states.name(group.snapshot.state),
            )
        group.snapshot.consistency = consistency
        group.snapshot.ClearField("expire_time")
        if group.snapshot.state != states.COPYING:  # settling writes its own record at the end
            await describe(core, group)
        await core.journal.save(group)
        live.keep()
        live.notify()
        return group.snapshot

    return await core.exclusive(group_id, work)


async def take_and_settle(core: Core, group_id: str, spec: pb.GroupSnapshotSpec) -> None:
    """Take a group snapshot of volumes that the caller already holds exclusively, and wait until it is READY.

    Repeatable: one that exists READY is fine. Raises what cutting and settling raise.
    """

    async def work(live: Live) -> None:
        group = await core.journal.get(group_id)
        if group is None:
            group = await _reserve(core, live, group_id, spec, DEFAULT_EXPIRE_S, claim=False)
        check_same(group, spec)
        if group.snapshot.state == states.PREPARED:
            await _cut(core, live, group, None)

    live = core.live(group_id)
    earlier = await core.journal.get(group_id)
    if earlier and earlier.snapshot.state == states.DELETING and live.job:
        await live.job  # what a stopped gateway had begun of it is being undone
    await core.exclusive(group_id, work)
    if live.job:
        await live.job
    group = await core.journal.get(group_id)
    if group is None or group.snapshot.state != states.READY:
        if core.stopping:
            raise Cancelled("the gateway stops", group=group_id)
        gone = pb.Failure(reason="OPERATION_PENDING", message="it was deleted")
        failure = group.snapshot.failure if group else gone
        raise Refused(
            failure.reason or "STATE_INVALID",
            f"the safety group snapshot {group_id} could not be made: {failure.message}",
            **(dict(failure.metadata) | {"group_snapshot": group_id}),
        )


def settle_again(core: Core, group: Group) -> None:
    """Resume the settling of a group that was cut before the gateway restarted."""
    if SAFETY_LABEL not in group.snapshot.labels:  # the volumes of a safety snapshot are its revert's
        core.claims.take(group.id, refs(group), exclusive=False)
    live = core.live(group.id)
    live.begin()
    live.job = core.spawn(_settle(core, live, group.id))


async def describe(core: Core, group: Group) -> None:
    """Write the group's record beside the snapshot in every pool. Raises the first pool's error."""
    record = records.render(group)

    if error := first_error(await core.in_pools(group, lambda pool: deleting.describe(pool, group.id, record))):
        raise error


async def found(core: Core, group_id: str) -> Group:
    """Return a group or raise Refused GROUP_SNAPSHOT_NOT_FOUND."""
    group = await core.journal.get(group_id)
    if group is None:
        raise Refused("GROUP_SNAPSHOT_NOT_FOUND", f"there is no group snapshot {group_id!r}", group_snapshot=group_id)
    return group


def check_same(group: Group, spec: pb.GroupSnapshotSpec) -> None:
    """Raise Refused GROUP_SNAPSHOT_EXISTS unless a repeat asks for what the first call asked for."""
    if group.spec.SerializeToString(deterministic=True) != spec.SerializeToString(deterministic=True):
        raise Refused(
            "GROUP_SNAPSHOT_EXISTS",
            f"group snapshot {group.id} exists with other volumes, labels, VM or options; choose another id",
            group_snapshot=group.id,
        )


def pending(group_id: str, doing: str) -> Refused:
    """Return the error for an id that is being worked on."""
    return Refused(
        "OPERATION_PENDING", f"group snapshot {group_id} is being {doing}; try again", group_snapshot=group_id
    )


def refs(group: Group) -> list[tuple[str, str]]:
    """Return (pool, volume) of every member."""
    return [(member.volume.pool, member.volume.volume) for member in group.snapshot.members]


async def _reserve(
    core: Core, live: Live, group_id: str, spec: pb.GroupSnapshotSpec, expire_s: float, *, claim: bool = True
) -> Group:
    if spec.memory:
        raise Refused("CAPABILITY_MISSING", "no provider can keep memory and device state yet", capability="memory")
    for volume in spec.volumes:
        core.pools.get(volume.ref.pool)
    snapshot = pb.GroupSnapshot(
        id=group_id,
        state=states.PREPARED,
        members=[pb.Member(volume=volume.ref, format=volume.format) for volume in spec.volumes],
        labels=spec.labels,
        vm=spec.vm if spec.HasField("vm") else None,
        consistency=pb.CONSISTENCY_CRASH,
        create_time=stamp(),
        expire_time=stamp(expire_s),
    )
    group = Group(snapshot, spec)
    if claim:
        core.claims.take(group_id, refs(group), exclusive=False)
    try:
        await core.journal.insert(group)
    except BaseException:
        core.claims.release(group_id)
        raise

    async def verb(pool: Pool) -> list[Member]:
        share = GroupSpec(group_id, volumes_of(group, pool.name), spec.allow_copy)
        return await pool.ask(lambda: pool.provider.prepare(share))

    results = await core.in_pools(group, verb)
    if error := first_error(results):
        await deleting.undo(core, live, group, "prepare failed", results)
        raise error
    _fill_members(group, results)
    await core.journal.save(group)
    live.prepared = group
    live.expire_in(expire_s, lambda: core.spawn(deleting.expire(core, group_id)))
    live.notify()
    return group


async def _cut(core: Core, live: Live, group: Group, confirm_s: float | None) -> None:
    live.keep()
    live.prepared = None
    snapshot = group.snapshot
    begin = time.monotonic()

    async def verb(pool: Pool) -> list[Member]:
        return await pool.cut.run(core.limits.cut_timeout_s, lambda: pool.provider.cut(group.id))

    results = await core.in_pools(group, verb)
    duration_s = time.monotonic() - begin
    if error := first_error(results):
        await deleting.undo(core, live, group, "cut failed", results)
        raise error
    snapshot.cut_time.CopyFrom(stamp())
    snapshot.cut_duration.FromTimedelta(timedelta(seconds=duration_s))
    snapshot.ClearField("expire_time")
    if confirm_s is not None:
        snapshot.expire_time.CopyFrom(stamp(confirm_s))
    _fill_members(group, results)
    states.move(snapshot, states.COPYING)
    try:
        relatives = await core.journal.save_cut(group)
    except Exception:
        # nobody was promised anything: undo it now; the row is still PREPARED, and goes at its expiry
        await core.in_pools(group, lambda pool: deleting.abort(pool, group.id))
        live.expire_in(1, lambda: core.spawn(deleting.expire(core, group.id)))
        raise
    CUT_SECONDS.observe(duration_s)
    log.info("cut", group=group.id, members=len(snapshot.members), cut_ms=round(duration_s * 1000, 1))
    if confirm_s is not None:
        live.expire_in(confirm_s, lambda: core.spawn(deleting.expire(core, group.id)))
    live.begin()
    live.job = core.spawn(_settle(core, live, group.id))
    core.spawn(deleting.redescribe(core, relatives))
    live.notify()


async def _settle(core: Core, live: Live, group_id: str) -> None:
    group = await core.journal.get(group_id)
    if group is None:
        return
    record = records.render(group)
    cut_time = group.snapshot.cut_time.ToDatetime(now().tzinfo)

    async def verb(pool: Pool) -> list[Member]:
        work = partial(pool.provider.settle, group_id, cut_time, record, live.reporter(pool.name))
        return await pool.work.run(None, work)

    results = await core.in_pools(group, partial(_with_patience, core, verb))
    async with live.lock:
        group = await core.journal.get(group_id)
        if group is None or group.snapshot.state != states.COPYING:
            return
        error = first_error(results)
        if isinstance(error, Cancelled) and core.stopping:
            return
        try:
            if error is None:
                _fill_members(group, results)
                if records.render(group) != record:
                    await describe(core, group)
                _ready(group)
        except Exception as failed:  # the job's edge: the outcome is written below
            error = failed
        if error is not None:
            await _fail(core, group, error)
        await core.journal.save(group)
        core.claims.release(group_id)
        live.notify()


async def _with_patience(core: Core, verb: Callable[[Pool], Awaitable[list[Member]]], pool: Pool) -> list[Member]:
    """Try again while the storage is away: what was cut is worth waiting for."""
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(PoolUnavailable),
        wait=wait_exponential(max=30),
        stop=stop_after_delay(core.limits.settle_retry_s),
        reraise=True,
    ):
        with attempt:
            return await verb(pool)
    raise AssertionError("tenacity returns or raises")


def _ready(group: Group) -> None:
    states.move(group.snapshot, states.READY)
    group.snapshot.ready_time.CopyFrom(stamp())
    group.snapshot.ClearField("progress")


async def _fail(core: Core, group: Group, error: Exception) -> None:
    """Make a group FAILED and remove what it has on the storages; what cannot be removed goes with its deletion."""
    states.move(group.snapshot, states.FAILED)
    group.snapshot.failure.CopyFrom(failure_of(error))
    group.snapshot.ClearField("expire_time")
    FAILED.labels(reason=group.snapshot.failure.reason).inc()
    log.error("group snapshot failed", group=group.id, reason=group.snapshot.failure.reason, error=str(error))

    for pool, result in (await core.in_pools(group, lambda pool: deleting.abort(pool, group.id))).items():
        if isinstance(result, Exception):
            log.warning(
                "what a failed snapshot left could not be removed yet",
                group=group.id,
                pool=pool,
                error=str(result),
            )


def _fill_members(group: Group, results: dict[str, list[Member] | BaseException]) -> None:
    by_name = {
        (pool, member.volume): member
        for pool, members in results.items()
        if isinstance(members, list)
        for member in members
    }
    for shown in group.snapshot.members:
        member = by_name[shown.volume.pool, shown.volume.volume]
        shown.handle = member.handle
        shown.size_bytes = member.size_bytes
        shown.format = member.format
        shown.mode = member.mode
        shown.local_path = member.local_path
        shown.atomic = member.atomic
