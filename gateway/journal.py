"""The journal: what the gateway has promised, on disk before anybody hears of it.

SQLite in WAL mode through SQLAlchemy. Intent is written before work, outcome after; a PREPARED row is itself
the intent to cut, so the freeze window costs one write. All writes go through one thread, which commits
everything that waits in one transaction (one fsync for many callers); reads have threads of their own.

A row holds the GroupSnapshot and its spec as protobuf; what is searched, and what other rows change (the
VM's parent and current), are columns.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from frostgate.v1 import group_snapshot_pb2 as pb

T = TypeVar("T")

SCHEMA_VERSION = 1

_schema = sa.MetaData()

_groups = sa.Table(
    "group_snapshots",
    _schema,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(128), nullable=False, unique=True),
    sa.Column("state", sa.Integer, nullable=False, index=True),
    sa.Column("phase", sa.String(16), nullable=False, default=""),
    sa.Column("vm_uuid", sa.String(36), nullable=False, default="", index=True),
    sa.Column("parent_id", sa.String(128), nullable=False, default=""),
    sa.Column("current", sa.Boolean, nullable=False, default=False),
    sa.Column("snapshot", sa.LargeBinary, nullable=False),
    sa.Column("spec", sa.LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)

_volumes = sa.Table(
    "volumes",
    _schema,
    sa.Column("seq", sa.ForeignKey("group_snapshots.seq", ondelete="CASCADE"), primary_key=True),
    sa.Column("pool", sa.String(63), primary_key=True),
    sa.Column("volume", sa.String(255), primary_key=True),
    sa.Index("volumes_by_name", "pool", "volume"),
)

_labels = sa.Table(
    "labels",
    _schema,
    sa.Column("seq", sa.ForeignKey("group_snapshots.seq", ondelete="CASCADE"), primary_key=True),
    sa.Column("key", sa.String(63), primary_key=True),
    sa.Column("value", sa.String(1024), nullable=False),
)


class JournalError(Exception):
    """The journal cannot be opened; the message says why and what to do."""


@dataclass
class Group:
    """A group snapshot as the journal has it.

    `phase` is how far a revert has come: "" (none), "staging" (nothing changed yet) or "swapping" (roll forward).
    """

    snapshot: pb.GroupSnapshot
    spec: pb.GroupSnapshotSpec
    phase: str = ""
    seq: int = 0

    @property
    def id(self) -> str:
        """The caller-chosen id."""
        return self.snapshot.id


@dataclass(frozen=True)
class Filter:
    """Conditions of a listing, combined with AND; `pools` restricts to groups that lie in these pools only."""

    vm_uuid: str = ""
    volume: tuple[str, str] | None = None
    labels: dict[str, str] = field(default_factory=dict)
    states: tuple[int, ...] = ()
    pools: frozenset[str] | None = None


class Journal:
    """The open journal. Methods are for the event loop; one process at a time has it."""

    def __init__(self, path: Path) -> None:
        """Open or make the journal. Raises JournalError (in use, newer than this program, not writable)."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._lock)
                raise JournalError(f"{path}: another gateway is using this journal") from error
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})
            sa.event.listen(self._engine, "connect", _configure)
            self._check_version(path)
        except (OSError, sa.exc.SQLAlchemyError) as error:
            raise JournalError(f"{path}: the journal cannot be opened: {error}") from error
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="journal-read")
        self._writes: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_loop, name="journal-write", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Finish what waits, then close."""
        self._writes.put(None)
        self._writer.join()
        self._readers.shutdown()
        self._engine.dispose()
        os.close(self._lock)

    async def insert(self, group: Group) -> bool:
        """Add a new group; False when the id is taken."""
        return await self._write(lambda connection: _insert(connection, group))

    async def save(self, group: Group) -> None:
        """Write the group's snapshot, state and phase. Parent and current are left alone."""
        await self._write(lambda connection: _save(connection, group))

    async def save_cut(self, group: Group) -> list[str]:
        """save(), and make it its VM's current snapshot; fills parent and current in group.snapshot.

        Returns the id that was current before, if any: its place in the tree changed.
        """
        return await self._write(lambda connection: _save_cut(connection, group))

    async def save_reverted(self, group: Group) -> list[str]:
        """save(), and make it its VM's current snapshot. Returns the ids whose place in the tree changed."""
        return await self._write(lambda connection: _save_reverted(connection, group))

    async def save_deleting(self, group: Group) -> list[str]:
        """save(), and take it out of its VM's tree: its parent takes its place.

        Returns the ids whose place in the tree changed.
        """
        return await self._write(lambda connection: _save_deleting(connection, group))

    async def remove(self, group_id: str) -> None:
        """Forget a group; one that is not known is fine."""
        await self._write(lambda connection: _remove(connection, group_id))

    async def restore(self, groups: Sequence[Group]) -> None:
        """Insert or replace groups as the storages have them, parent and current from the snapshots themselves."""
        await self._write(lambda connection: _restore(connection, groups))

    async def get(self, group_id: str) -> Group | None:
        """Return one group or None."""
        return await self._read(lambda connection: _get(connection, group_id))

    async def page(self, condition: Filter, before_seq: int | None, limit: int) -> list[Group]:
        """Return at most `limit` groups that came before `before_seq`, newest first."""
        return await self._read(lambda connection: _page(connection, condition, before_seq, limit))

    async def all(self) -> list[Group]:
        """Return every group, oldest first."""
        return await self._read(_all)

    def _check_version(self, path: Path) -> None:
        with self._engine.begin() as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if found > SCHEMA_VERSION:
                raise JournalError(
                    f"{path}: written by a newer Frostgate (schema {found}, this one knows {SCHEMA_VERSION}): upgrade"
                )
            _schema.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    async def _read(self, work: Callable[[sa.Connection], T]) -> T:
        def run() -> T:
            with self._engine.connect() as connection:
                return work(connection)

        return await asyncio.get_running_loop().run_in_executor(self._readers, run)

    async def _write(self, work: Callable[[sa.Connection], T]) -> T:
        write = _Write(work)
        self._writes.put(write)
        # shielded: a caller that goes away must not cancel what is promised to others in the same transaction
        result: T = await asyncio.shield(asyncio.wrap_future(write.outcome))
        return result

    def _write_loop(self) -> None:
        while (first := self._writes.get()) is not None:
            batch = [first]
            last = False
            while not self._writes.empty():
                following = self._writes.get()
                if following is None:
                    last = True
                    break
                batch.append(following)
            if not self._commit(batch) and len(batch) > 1:
                for write in batch:  # one of them failed: each alone, so that only its caller hears of it
                    self._commit([write])
            if last:
                return

    def _commit(self, batch: list[_Write]) -> bool:
        """Run a batch in one transaction; on an error say it to a lone caller, or return False for a retry each."""
        try:
            with self._engine.begin() as connection:
                results = [write.work(connection) for write in batch]
        except Exception as error:  # the thread's edge: the caller gets it
            if len(batch) == 1:
                batch[0].outcome.set_exception(error)
            return False
        for write, result in zip(batch, results, strict=True):
            write.outcome.set_result(result)
        return True


class _Write:
    def __init__(self, work: Callable[[sa.Connection], Any]) -> None:
        self.work = work
        self.outcome: Future[Any] = Future()
        self.outcome.set_running_or_notify_cancel()


def _configure(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # a promise survives a power cut, not only a crash
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _insert(connection: sa.Connection, group: Group) -> bool:
    snapshot = group.snapshot
    if connection.execute(sa.select(_groups.c.seq).where(_groups.c.id == snapshot.id)).first():
        return False
    row = connection.execute(
        sa.insert(_groups).values(
            id=snapshot.id,
            vm_uuid=snapshot.vm.uuid,
            parent_id=snapshot.vm.parent_id,
            current=snapshot.vm.current,
            spec=group.spec.SerializeToString(deterministic=True),
            **_changing(group),
        )
    )
    (group.seq,) = row.inserted_primary_key or (0,)
    volumes = [{"seq": group.seq, "pool": m.volume.pool, "volume": m.volume.volume} for m in snapshot.members]
    connection.execute(sa.insert(_volumes), volumes)
    if snapshot.labels:
        labels = [{"seq": group.seq, "key": key, "value": value} for key, value in snapshot.labels.items()]
        connection.execute(sa.insert(_labels), labels)
    return True


def _changing(group: Group) -> dict[str, Any]:
    return {
        "state": group.snapshot.state,
        "phase": group.phase,
        "snapshot": group.snapshot.SerializeToString(deterministic=True),
    }


def _save(connection: sa.Connection, group: Group) -> None:
    connection.execute(sa.update(_groups).where(_groups.c.id == group.id).values(**_changing(group)))


def _save_cut(connection: sa.Connection, group: Group) -> list[str]:
    vm = group.snapshot.vm
    if vm.uuid:
        vm.parent_id = _current(connection, vm.uuid) or ""
        vm.current = True
        _set_current(connection, vm.uuid, group.id)
        connection.execute(sa.update(_groups).where(_groups.c.id == group.id).values(parent_id=vm.parent_id))
    _save(connection, group)
    return [vm.parent_id] if vm.parent_id else []


def _save_reverted(connection: sa.Connection, group: Group) -> list[str]:
    _save(connection, group)
    uuid = group.snapshot.vm.uuid
    if not uuid:
        return [group.id]
    changed = {group.id, _current(connection, uuid) or group.id}
    _set_current(connection, uuid, group.id)
    return sorted(changed)


def _save_deleting(connection: sa.Connection, group: Group) -> list[str]:
    row = connection.execute(
        sa.select(_groups.c.vm_uuid, _groups.c.parent_id, _groups.c.current).where(_groups.c.id == group.id)
    ).first()
    _save(connection, group)
    if row is None or not row.vm_uuid:
        return []
    same_vm = _groups.c.vm_uuid == row.vm_uuid
    children = sa.and_(same_vm, _groups.c.parent_id == group.id)
    changed = list(connection.scalars(sa.select(_groups.c.id).where(children)))
    connection.execute(sa.update(_groups).where(children).values(parent_id=row.parent_id))
    if row.current:
        _set_current(connection, row.vm_uuid, row.parent_id)
        changed += [row.parent_id] if row.parent_id else []
    return changed


def _current(connection: sa.Connection, vm_uuid: str) -> str | None:
    return connection.scalar(sa.select(_groups.c.id).where(_groups.c.vm_uuid == vm_uuid, _groups.c.current))


def _set_current(connection: sa.Connection, vm_uuid: str, group_id: str) -> None:
    connection.execute(sa.update(_groups).where(_groups.c.vm_uuid == vm_uuid).values(current=_groups.c.id == group_id))


def _remove(connection: sa.Connection, group_id: str) -> None:
    connection.execute(sa.delete(_groups).where(_groups.c.id == group_id))


def _restore(connection: sa.Connection, groups: Iterable[Group]) -> None:
    for group in groups:
        _remove(connection, group.id)
        _insert(connection, group)


_columns = (
    _groups.c.seq,
    _groups.c.phase,
    _groups.c.parent_id,
    _groups.c.current,
    _groups.c.snapshot,
    _groups.c.spec,
)


def _group(row: Any) -> Group:
    snapshot = pb.GroupSnapshot.FromString(row.snapshot)
    if snapshot.HasField("vm"):
        snapshot.vm.parent_id = row.parent_id
        snapshot.vm.current = row.current
    return Group(snapshot, pb.GroupSnapshotSpec.FromString(row.spec), row.phase, row.seq)


def _get(connection: sa.Connection, group_id: str) -> Group | None:
    row = connection.execute(sa.select(*_columns).where(_groups.c.id == group_id)).first()
    return _group(row) if row else None


def _page(connection: sa.Connection, condition: Filter, before_seq: int | None, limit: int) -> list[Group]:
    query = sa.select(*_columns).order_by(_groups.c.seq.desc()).limit(limit)
    if before_seq is not None:
        query = query.where(_groups.c.seq < before_seq)
    if condition.vm_uuid:
        query = query.where(_groups.c.vm_uuid == condition.vm_uuid)
    if condition.states:
        query = query.where(_groups.c.state.in_(condition.states))
    if condition.volume:
        pool, volume = condition.volume
        of_volume = sa.select(_volumes.c.seq).where(_volumes.c.pool == pool, _volumes.c.volume == volume)
        query = query.where(_groups.c.seq.in_(of_volume))
    if condition.pools is not None:
        elsewhere = sa.select(_volumes.c.seq).where(_volumes.c.pool.not_in(condition.pools))
        query = query.where(_groups.c.seq.not_in(elsewhere))
    for key, value in condition.labels.items():
        labelled = sa.select(_labels.c.seq).where(_labels.c.key == key, _labels.c.value == value)
        query = query.where(_groups.c.seq.in_(labelled))
    return [_group(row) for row in connection.execute(query)]


def _all(connection: sa.Connection) -> list[Group]:
    return [_group(row) for row in connection.execute(sa.select(*_columns).order_by(_groups.c.seq))]
