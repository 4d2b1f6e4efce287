"""What a starting gateway does with what it finds, and how a lost journal is rebuilt from the storages."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import volume_pb2
from gateway import deleting, records, reverting, states, taking
from gateway.groups import Core, log
from gateway.journal import Group
from providers.base import ProviderError, StoredGroup


async def resume(core: Core) -> None:
    """Resume or undo everything that an earlier gateway left unfinished; returns when all of it is under way.

    Reservations and snapshots that nobody confirmed are undone: their callers' freeze is long over.
    """
    groups = await core.journal.all()
    for group in groups:
        if group.snapshot.state == states.REVERTING:
            log.info("resuming a revert", group=group.id, phase=group.phase)
            reverting.revert_again(core, group)
    for group in groups:
        state = group.snapshot.state
        if state == states.DELETING:
            log.info("resuming a deletion", group=group.id)
            deleting.delete_again(core, group)
        elif group.snapshot.HasField("expire_time"):
            log.info("undoing what nobody confirmed", group=group.id, state=states.name(state))
            await deleting.delete(core, group.id)
        elif state == states.COPYING:
            log.info("settling again", group=group.id)
            taking.settle_again(core, group)


@dataclass
class Reconciled:
    """What reconcile() found and did, as ids."""

    restored: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


async def reconcile(core: Core) -> Reconciled:
    """Rebuild the journal from what the storages say exists. The gateway must not be running.

    What the journal does not have is restored; a group that some of its pools have lost becomes FAILED; what
    nobody had confirmed is removed. Repeatable. Raises PoolUnavailable when a storage does not answer: without
    all of them nothing can be said.
    """
    stored: dict[str, dict[str, StoredGroup]] = {}
    for pool in core.pools.all():
        for found in await pool.work.run(None, lambda provider=pool.provider: list(provider.snapshots())):  # type: ignore[misc]
            stored.setdefault(found.group, {})[pool.name] = found
    outcome = Reconciled()
    known = {group.id: group for group in await core.journal.all()}
    restored = []
    for group_id, parts in sorted(stored.items()):
        if group_id in known:
            continue
        group = _from_storage(group_id, parts)
        if group.snapshot.HasField("expire_time"):
            await _remove(core, group_id, parts)
            outcome.removed.append(group_id)
            continue
        restored.append(group)
        failed = group.snapshot.state == states.FAILED
        (outcome.incomplete if failed else outcome.restored).append(group_id)
    for pool in core.pools.all():
        for group_id in await pool.work.run(None, lambda provider=pool.provider: list(provider.leftovers())):  # type: ignore[misc]
            if group_id not in known:
                await _remove(core, group_id, {pool.name: StoredGroup(group_id, None, ())})
                outcome.removed.append(group_id)
    restored.sort(key=lambda group: group.snapshot.cut_time.ToNanoseconds())
    _one_current(restored)
    await core.journal.restore(restored)
    for group in known.values():
        if group.snapshot.state != states.READY:
            continue
        pools = {member.volume.pool for member in group.snapshot.members}
        if lost := sorted(pools - stored.get(group.id, {}).keys()):
            _damage(group, lost)
            await core.journal.save(group)
            outcome.missing.append(group.id)
    return outcome


def _from_storage(group_id: str, parts: dict[str, StoredGroup]) -> Group:
    """Return a group from its record, or, when no storage has a readable one, from the bare members."""
    for part in parts.values():
        try:
            group = records.parse(part.record)
        except ValueError as error:
            log.warning("a stored record cannot be read", group=group_id, error=str(error))
            continue
        if not group.snapshot.HasField("ready_time"):  # the record is written just before it is READY
            group.snapshot.ready_time.CopyFrom(group.snapshot.cut_time)
        lost = sorted({member.volume.pool for member in group.snapshot.members} - parts.keys())
        if lost:
            _damage(group, lost)
        return group
    snapshot = pb.GroupSnapshot(id=group_id, state=states.READY, consistency=pb.CONSISTENCY_CRASH)
    spec = pb.GroupSnapshotSpec()
    for pool, part in sorted(parts.items()):
        for member in part.members:
            ref = volume_pb2.VolumeRef(pool=pool, volume=member.volume)
            spec.volumes.add(ref=ref, format=member.format)
            snapshot.members.add(
                volume=ref,
                handle=member.handle,
                size_bytes=member.size_bytes,
                format=member.format,
                mode=member.mode,
                local_path=member.local_path,
                atomic=member.atomic,
            )
        if part.cut_time:
            for time in (snapshot.create_time, snapshot.cut_time, snapshot.ready_time):
                time.FromDatetime(part.cut_time)
    return Group(snapshot, spec)


def _one_current(groups: list[Group]) -> None:
    """Leave one current snapshot a VM, the latest: a crash can have kept an older record from being written."""
    seen = set()
    for group in reversed(groups):
        vm = group.snapshot.vm
        if vm.current and vm.uuid in seen:
            vm.current = False
        if vm.current:
            seen.add(vm.uuid)


def _damage(group: Group, lost: list[str]) -> None:
    group.snapshot.state = states.FAILED
    group.snapshot.failure.CopyFrom(
        pb.Failure(
            reason="SNAPSHOT_DAMAGED",
            message=f"pool {', '.join(lost)} has lost its members; delete the group snapshot",
            metadata={"pool": ",".join(lost)},
        )
    )


async def _remove(core: Core, group_id: str, parts: dict[str, StoredGroup]) -> None:
    for name in parts:
        pool = core.pools.get(name)
        try:
            await pool.ask(partial(pool.provider.abort, group_id))
            await pool.ask(partial(pool.provider.delete, group_id, lambda _done, _total: None))
        except ProviderError as error:
            log.warning("could not be removed", group=group_id, pool=name, error=str(error))
