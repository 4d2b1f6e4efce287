"""Reverting volumes to a group snapshot: staging in every pool, safety snapshot, then the swap in every pool.

Until the first swap a failure changes nothing. From there on it only goes forward: the journal has the phase,
and a gateway that died finishes, so that no VM is left with volumes of two different times.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_delay,
    wait_exponential,
    wait_fixed,
)

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import volume_pb2
from gateway import deleting, states
from gateway.errors import Refused, failure_of
from gateway.groups import Core, Live, first_error, log, now, stamp
from gateway.journal import Group
from gateway.pools import Pool
from gateway.taking import SAFETY_LABEL, found, take_and_settle
from providers.base import Cancelled, Volume, VolumeInUse, VolumeNotFound

STAGING = "staging"
SWAPPING = "swapping"

_FORGOTTEN_AFTER_S = 45.0
"""How long a storage may count a process that died as a user of a volume; Ceph: osd_client_watch_timeout, 30 s."""


async def revert(
    core: Core,
    group_id: str,
    volumes: Sequence[volume_pb2.VolumeRef],
    safety_id: str,
    *,
    no_safety: bool,
    instant: bool = False,
) -> pb.GroupSnapshot:
    """Check a revert and begin it; a repeat with the same safety_id is the same revert.

    Raises Refused (STATE_INVALID, MEMBER_NOT_FOUND, VOLUME_BUSY, GROUP_SNAPSHOT_EXISTS), VolumeInUse,
    CapabilityMissing, PoolUnavailable; nothing is changed then.
    """

    async def work(live: Live) -> pb.GroupSnapshot:
        group = await found(core, group_id)
        chosen = _chosen(group, volumes)
        if await _is_repeat(core, group, chosen, safety_id):
            return group.snapshot
        if group.snapshot.HasField("expire_time"):
            raise Refused(
                "STATE_INVALID",
                f"group snapshot {group_id} is not confirmed yet",
                group_snapshot=group_id,
                state="READY",
            )
        if group.snapshot.state != states.READY:
            raise Refused(
                "STATE_INVALID",
                f"group snapshot {group_id} is {states.name(group.snapshot.state)}, not READY",
                group_snapshot=group_id,
                state=states.name(group.snapshot.state),
            )
        core.claims.take(group_id, [(ref.pool, ref.volume) for ref in chosen], exclusive=True)
        try:
            await _check_pools(core, chosen, instant=instant)
            states.move(group.snapshot, states.REVERTING)
            group.phase = STAGING
            group.snapshot.revert.CopyFrom(
                pb.Revert(
                    state=pb.Revert.STATE_RUNNING,
                    volumes=chosen,
                    safety_id="" if no_safety else safety_id or _chosen_safety_id(group_id),
                    begin_time=stamp(),
                    instant=instant,
                )
            )
            await core.journal.save(group)
        except BaseException:
            core.claims.release(group_id)
            raise
        live.begin()
        live.job = core.spawn(_run(core, live, group))
        live.notify()
        return group.snapshot

    return await core.exclusive(group_id, work)


def revert_again(core: Core, group: Group) -> None:
    """Resume a revert that the journal has, after the gateway restarted."""
    core.claims.take(group.id, [(ref.pool, ref.volume) for ref in group.snapshot.revert.volumes], exclusive=True)
    live = core.live(group.id)
    live.begin()
    live.job = core.spawn(_run(core, live, group, users_end_within_s=_FORGOTTEN_AFTER_S))


def _chosen(group: Group, volumes: Sequence[volume_pb2.VolumeRef]) -> list[volume_pb2.VolumeRef]:
    members = {(member.volume.pool, member.volume.volume) for member in group.snapshot.members}
    for ref in volumes:
        if (ref.pool, ref.volume) not in members:
            raise Refused(
                "MEMBER_NOT_FOUND",
                f"group snapshot {group.id} has no member {ref.pool}/{ref.volume}",
                group_snapshot=group.id,
                pool=ref.pool,
                volume=ref.volume,
            )
    return list(volumes) or [member.volume for member in group.snapshot.members]


async def _is_repeat(core: Core, group: Group, chosen: list[volume_pb2.VolumeRef], safety_id: str) -> bool:
    if not safety_id:
        return False
    latest = group.snapshot.revert
    if latest.safety_id == safety_id:
        if list(latest.volumes) != chosen:
            raise Refused(
                "GROUP_SNAPSHOT_EXISTS",
                f"safety_id {safety_id} names a revert of other volumes",
                group_snapshot=safety_id,
            )
        return latest.state != pb.Revert.STATE_FAILED
    other = await core.journal.get(safety_id)
    if other is None:
        return False
    if other.snapshot.labels.get(SAFETY_LABEL) == group.id:
        return True  # an older revert to this snapshot
    raise Refused(
        "GROUP_SNAPSHOT_EXISTS",
        f"group snapshot {safety_id} exists and is no safety of this revert",
        group_snapshot=safety_id,
    )


async def _check_pools(core: Core, chosen: list[volume_pb2.VolumeRef], *, instant: bool) -> None:
    for pool_name in sorted({ref.pool for ref in chosen}):
        pool = core.pools.get(pool_name)
        capabilities = await pool.ask(pool.provider.capabilities)
        if not capabilities.revert:
            raise Refused("CAPABILITY_MISSING", f"pool {pool_name} cannot revert", pool=pool_name, capability="revert")
        if instant and not capabilities.instant_revert:
            raise Refused(
                "CAPABILITY_MISSING",
                f"pool {pool_name} cannot revert in an instant; leave `instant` out",
                pool=pool_name,
                capability="instant_revert",
            )
        if capabilities.online_revert:
            continue
        for name in (ref.volume for ref in chosen if ref.pool == pool_name):
            volume = await pool.ask(partial(_volume_if_there, pool, name))
            if volume and volume.in_use:
                users = ", ".join(volume.users) or "somebody"
                raise VolumeInUse(
                    f"volume {pool_name}/{name} is in use by {users}; stop it first",
                    pool=pool_name,
                    volume=name,
                    users=users,
                )


def _volume_if_there(pool: Pool, name: str) -> Volume | None:
    try:
        return pool.provider.volume(name)
    except VolumeNotFound:
        return None  # a lost volume is what a revert brings back


async def _run(core: Core, live: Live, group: Group, *, users_end_within_s: float = 0) -> None:
    """Do the revert, from the phase that the journal has."""
    try:
        if group.phase == STAGING:
            await _stage(core, live, group, users_end_within_s)
            group.phase = SWAPPING
            await core.journal.save(group)
    except Exception as error:  # the job's edge: the outcome is written
        if core.stopping:
            return
        await _give_up(core, live, group, error)
        return
    stopped = first_error(await core.in_pools(group, partial(_swap, core, live, group)))
    if stopped:
        log.info("revert goes on at the next start", group=group.id, error=str(stopped))
        return
    async with live.lock:
        _end(group, pb.Revert.STATE_DONE)
        relatives = await core.journal.save_reverted(group)
        core.claims.release(group.id)
        live.notify()
    log.info("reverted", group=group.id, volumes=len(group.snapshot.revert.volumes))
    await deleting.redescribe(core, relatives)


async def _stage(core: Core, live: Live, group: Group, users_end_within_s: float) -> None:
    """Stage first, which keeps the volumes from being written; the safety snapshot then is of what will be replaced."""

    async def verb(pool: Pool) -> None:
        names = _names(group, pool)
        if names:
            stage = partial(pool.provider.prepare_revert, instant=group.snapshot.revert.instant)
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(VolumeInUse),
                stop=stop_after_delay(users_end_within_s),
                wait=wait_fixed(1),
                reraise=True,
            ):
                with attempt:
                    if core.stopping:
                        raise Cancelled("the gateway stops")
                    await pool.work.run(None, partial(stage, group.id, names, live.reporter(pool.name)))

    if error := first_error(await core.in_pools(group, verb)):
        raise error
    safety_id = group.snapshot.revert.safety_id
    chosen = group.snapshot.revert.volumes
    if safety_id:
        formats = {(m.volume.pool, m.volume.volume): m.format for m in group.snapshot.members}
        spec = pb.GroupSnapshotSpec(
            volumes=[pb.VolumeSpec(ref=ref, format=formats[ref.pool, ref.volume]) for ref in chosen],
            labels={SAFETY_LABEL: group.id},
        )
        if group.snapshot.HasField("vm"):
            vm = group.snapshot.vm
            spec.vm.CopyFrom(pb.VmRecord(uuid=vm.uuid, name=vm.name, domain_xml=vm.domain_xml))
        earlier = await core.journal.get(safety_id)
        if earlier and earlier.snapshot.labels.get(SAFETY_LABEL) == group.id:
            await deleting.delete(core, safety_id)  # of before a crash: the VM may have run meanwhile
        await take_and_settle(core, safety_id, spec)


async def _swap(core: Core, live: Live, group: Group, pool: Pool) -> None:
    names = _names(group, pool)
    if not names:
        return
    async for attempt in AsyncRetrying(
        retry=retry_if_exception(lambda error: not isinstance(error, Cancelled)),
        wait=wait_exponential(max=30),
        before_sleep=lambda state: log.error(
            "revert is half done and waits",
            group=group.id,
            pool=pool.name,
            error=str(state.outcome and state.outcome.exception()),
        ),
        reraise=True,
    ):
        with attempt:
            if core.stopping:
                raise Cancelled("the gateway stops")
            await pool.work.run(None, partial(pool.provider.revert, group.id, names, live.reporter(pool.name)))


async def _give_up(core: Core, live: Live, group: Group, error: Exception) -> None:
    """Nothing was swapped: remove what was staged, and the safety snapshot, which shows what is still there."""
    log.warning("revert failed, nothing was changed", group=group.id, error=str(error))

    async def verb(pool: Pool) -> None:
        await pool.ask(lambda: pool.provider.abort_revert(group.id))

    for pool, result in (await core.in_pools(group, verb)).items():
        if isinstance(result, Exception):
            log.warning(
                "what a failed revert staged could not be removed", group=group.id, pool=pool, error=str(result)
            )
    safety_id = group.snapshot.revert.safety_id
    safety = await core.journal.get(safety_id) if safety_id else None
    if safety and safety.snapshot.labels.get(SAFETY_LABEL) == group.id:
        await deleting.delete(core, safety_id)
    async with live.lock:
        _end(group, pb.Revert.STATE_FAILED)
        group.snapshot.revert.failure.CopyFrom(failure_of(error))
        await core.journal.save(group)
        core.claims.release(group.id)
        live.notify()


def _end(group: Group, outcome: pb.Revert.State.ValueType) -> None:
    states.move(group.snapshot, states.READY)
    group.phase = ""
    group.snapshot.revert.state = outcome
    group.snapshot.revert.end_time.CopyFrom(stamp())


def _names(group: Group, pool: Pool) -> list[str]:
    return [ref.volume for ref in group.snapshot.revert.volumes if ref.pool == pool.name]


def _chosen_safety_id(group_id: str) -> str:
    return f"{group_id[:90]}-before-{now():%Y%m%dT%H%M%S%fZ}"
