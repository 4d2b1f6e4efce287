"""The storpool provider: volumes of one template, name prefix or tag in a StorPool cluster.

A cut is one VolumesGroupSnapshot, whatever the number of volumes and with clients writing. What there is of group
snapshots is kept in the cluster: tags on the snapshots (tags.py) and a small volume with the record (store.py). The
provider itself remembers only reservations and what it has attached.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime

import structlog
from pydantic import BaseModel

from providers.base import (
    BlockReader,
    Capabilities,
    DiskSource,
    Extent,
    GroupSpec,
    InvalidName,
    Member,
    Provider,
    ReportProgress,
    SnapshotNotFound,
    Space,
    StoredGroup,
    Volume,
    VolumeChanged,
    VolumeExists,
    VolumeNotFound,
)
from providers.refusals import check_count, check_raw, not_in_journal
from providers.storpool import cutting, reverting, tags
from providers.storpool.cluster import Cluster, Exists
from providers.storpool.cutting import Reservation, shown
from providers.storpool.devices import Devices
from providers.storpool.late import LateCuts
from providers.storpool.objects import Found, Objects
from providers.storpool.options import StorPoolOptions
from providers.storpool.reading import DeviceReader, differences
from providers.storpool.store import Store, is_settled

log = structlog.get_logger()

_MAX_MEMBERS = 128
_THREADS = 32


class StorPoolProvider(Provider):
    """See providers.base.Provider for what each verb promises."""

    Options = StorPoolOptions

    def __init__(self, pool: str, options: StorPoolOptions) -> None:
        """Take the pool's name and options; nothing is asked yet."""
        self._pool = pool
        self._options = options
        self._cluster = Cluster(pool, options)
        self._objects = Objects(self._cluster, options)
        self._devices = Devices(self._cluster, self._objects, options)
        self._late = LateCuts(self._remove_cut)
        self._store = Store(self._cluster, self._objects, self._devices)
        self._lock = threading.Lock()
        self._reservations: dict[str, Reservation] = {}
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"{pool}-storpool")

    @classmethod
    def open_pool(cls, pool: str, options: BaseModel) -> StorPoolProvider:
        """See Provider."""
        return cls(pool, StorPoolOptions.model_validate(options.model_dump()))

    def capabilities(self) -> Capabilities:
        """See Provider."""
        readable = self._cluster.client_id is not None
        return Capabilities(
            atomic_group=True,
            instant_cut=True,
            revert=True,
            instant_revert=True,
            online_revert=self._options.force_detach,
            clone=True,
            read_blocks=readable,
            allocated_extents=readable,
            changed_extents=readable,
            max_members=_MAX_MEMBERS,
        )

    def space(self) -> Space:
        """See Provider."""
        return self._objects.space()

    def volumes(self, after: str, limit: int) -> list[Volume]:
        """See Provider."""
        page = [found for found in self._objects.volumes() if found.name > after][:limit]
        attachments = self._objects.attachments() if page else []
        return [self._objects.shown(found, attachments) for found in page]

    def volume(self, name: str) -> Volume:
        """See Provider."""
        global_id = self._objects.volume(name).global_id
        for found in self._objects.volumes():  # only the list of all tells what a volume takes
            if found.global_id == global_id:
                return self._objects.shown(found, self._objects.attachments())
        raise VolumeNotFound(f"there is no volume {name} any more", volume=name)

    def resolve(self, source: DiskSource) -> str | None:
        """See Provider. Devices are known by the directories that StorPool makes them in, by name or global id."""
        name = self._named_by(source.block_device or source.file or "")
        if name is None:
            return None
        try:
            return self._objects.volume(name).name
        except (VolumeNotFound, InvalidName):
            return None

    def prepare(self, spec: GroupSpec) -> list[Member]:
        """See Provider."""
        check_count(spec, _MAX_MEMBERS)
        check_raw(spec)
        self._devices.client()  # or the record could not be written after the cut
        record = self._store.find(spec.group)
        if record and is_settled(record):
            raise not_in_journal(spec.group)
        reservation = cutting.reserve(self._objects, spec, self._executor)
        self._remove_unfinished(spec.group, record)
        with self._lock:
            self._reservations[spec.group] = reservation
        return reservation.members()

    def cut(self, group: str) -> list[Member]:
        """See Provider."""
        with self._lock:
            reservation = self._reservations.get(group)
        if reservation is None:
            raise VolumeChanged(f"the reservation of {group} is gone: prepare again", group=group)
        if reservation.snapshots is None:
            cutting.cut(self._cluster, self._objects, reservation, self._executor, self._late)
        return reservation.members()

    def settle(self, group: str, cut_time: datetime, record: bytes, progress: ReportProgress) -> list[Member]:
        """See Provider. The snapshots are durable as soon as they are; what is written is the record."""
        progress(0, 0)
        try:
            members = self._members(group)
        except SnapshotNotFound as error:
            raise VolumeChanged(f"the cut of {group} did not survive: {error.message}", group=group) from error
        self._store.finish(group, members[0].tags[tags.CUT], cut_time, record)
        with self._lock:
            self._reservations.pop(group, None)
        return [_shown(member) for member in members]

    def describe(self, group: str, record: bytes) -> None:
        """See Provider."""
        self._store.describe(self._store.settled(group), record)

    def abort(self, group: str) -> None:
        """See Provider. What is settled is finished, and stays."""
        with self._lock:
            self._reservations.pop(group, None)
        record = self._store.find(group)
        if record is None or not is_settled(record):
            self._remove_unfinished(group, record)

    def check_deletable(self, group: str) -> None:
        """See Provider. A snapshot that volumes are based on can be deleted: StorPool keeps what they need of it."""
        cutting.check_removable(self._objects, self._devices, self._objects.members(group))

    def delete(self, group: str, progress: ReportProgress) -> None:
        """See Provider. The record goes first: without it there is no snapshot."""
        with self._lock:
            self._reservations.pop(group, None)
        self._remove_unfinished(group, self._store.find(group), progress)

    def prepare_revert(
        self, group: str, volumes: Sequence[str], progress: ReportProgress, *, instant: bool = False
    ) -> None:
        """See Provider. Every revert is instant. Nothing keeps a client from attaching a volume before revert()."""
        progress(0, 0)
        reverting.chosen(group, self._settled(group), volumes)
        if not self._options.force_detach:
            reverting.check_detached(self._objects, reverting.present(self._objects, volumes))

    def revert(self, group: str, volumes: Sequence[str], progress: ReportProgress) -> None:
        """See Provider."""
        snapshots = reverting.chosen(group, self._settled(group), volumes)
        now = reverting.present(self._objects, volumes)
        if self._options.force_detach:
            reverting.detach_all(self._cluster, self._objects, self._store, group, now)
        else:
            reverting.check_detached(self._objects, now)
        made = reverting.set_back(self._cluster, self._objects, snapshots, progress)
        if self._options.force_detach:
            reverting.attach_again(self._cluster, self._store, group, made)

    def abort_revert(self, group: str) -> None:
        """See Provider: prepare_revert() changes nothing."""

    def clone(self, group: str, volume: str, target: str, progress: ReportProgress) -> Volume:
        """See Provider. A volume based on the snapshot: made at once, and reading from it what it has not written."""
        self._objects.check_target(target)
        progress(0, 0)
        mark = tags.clone_mark(self._objects.scope, group, volume)
        snapshot = self._member(group, volume)
        try:
            self._objects.created(target, {tags.CLONE: mark}, parent=snapshot.by_id)
        except Exists as error:
            if self._tags_of(target).get(tags.CLONE) != mark:
                raise VolumeExists(f"there is a volume or snapshot {target} already", volume=target) from error
        return self.volume(target)

    def open(self, group: str, volume: str) -> BlockReader:
        """See Provider."""
        return DeviceReader(self._devices, self._member(group, volume))

    def changed_extents(self, group: str, volume: str, base: str | None, *, coarse: bool = False) -> Iterator[Extent]:
        """See Provider. By reading: all of both members, as the API does not tell."""
        with ExitStack() as stack:
            newer = stack.enter_context(DeviceReader(self._devices, self._member(group, volume)))
            if base is None:
                yield from newer.extents(0, newer.size_bytes)
                return
            older = stack.enter_context(DeviceReader(self._devices, self._member(base, volume)))
            yield from differences(newer, older)

    def snapshots(self) -> Iterator[StoredGroup]:
        """See Provider. A group that the cluster has lost snapshots of is left out, with a warning."""
        members: dict[str, list[Found]] = {}
        for member in self._objects.members():
            members.setdefault(member.tags[tags.GROUP], []).append(member)
        for record in filter(is_settled, self._objects.records()):
            group = record.tags[tags.GROUP]
            try:
                found = cutting.whole(group, members.get(group, []), record.tags.get(tags.CUT))
            except SnapshotNotFound as error:
                log.warning("the cluster has lost snapshots", pool=self._pool, group=group, error=error.message)
                continue
            try:
                content = self._store.read(record).record
            except SnapshotNotFound as error:
                log.warning("a record cannot be read", pool=self._pool, group=group, error=error.message)
                content = b""
            yield StoredGroup(group, tags.cut_time_in(record.tags), tuple(map(_shown, found)), content)

    def leftovers(self) -> Iterator[str]:
        """See Provider."""
        records = self._objects.records()
        settled = {record.tags[tags.GROUP] for record in records if is_settled(record)}
        everything = {found.tags[tags.GROUP] for found in [*records, *self._objects.members()]}
        yield from sorted(everything - settled)

    def close(self) -> None:
        """See Provider."""
        self._late.close()
        self._executor.shutdown(wait=False)

    def _members(self, group: str) -> list[Found]:
        """Return a cut's snapshots in their order. Raises SnapshotNotFound."""
        with self._lock:
            reservation = self._reservations.get(group)
        if reservation:
            return cutting.whole(group, self._objects.members(group), reservation.cut)
        record = self._store.find(group)
        return cutting.whole(group, self._objects.members(group), record.tags.get(tags.CUT) if record else None)

    def _settled(self, group: str) -> list[Found]:
        """Return a finished group's snapshots, as many as there are. Raises SnapshotNotFound."""
        cut = self._store.settled(group).tags.get(tags.CUT)
        return [member for member in self._objects.members(group) if member.tags.get(tags.CUT) == cut]

    def _member(self, group: str, volume: str) -> Found:
        return reverting.chosen(group, self._settled(group), [volume])[volume]

    def _remove_unfinished(self, group: str, record: Found | None, progress: ReportProgress | None = None) -> None:
        if record:
            self._store.remove(record)
        members = self._objects.members(group)
        total = sum(member.size_bytes for member in members)
        if progress:
            progress(0, total)
        cutting.remove(self._objects, self._devices, self._cluster, members)
        if progress:
            progress(total, total)

    def _remove_cut(self, group: str, cut: str) -> int:
        members = [member for member in self._objects.members(group) if member.tags.get(tags.CUT) == cut]
        cutting.remove(self._objects, self._devices, self._cluster, members)
        return len(members)

    def _tags_of(self, name: str) -> dict[str, str]:
        try:
            return self._objects.volume(name).tags
        except VolumeNotFound:
            return {}

    def _named_by(self, path: str) -> str | None:
        directory, _, name = path.rpartition("/")
        if not name:
            return None
        if directory == str(self._options.devices_by_id):
            return f"~{name}"
        if any(directory == str(known) for known in self._options.device_directories):
            return name
        return None


def _shown(member: Found) -> Member:
    return shown(tags.volume_in(member.tags), member.size_bytes, member.global_id)
