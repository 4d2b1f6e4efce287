"""The ceph provider: the images of one rbd pool and namespace.

A cut is one RBD group snapshot, whatever the number of images and with QEMU writing through its exclusive locks
(cutting.py). What there is of group snapshots is kept in the pool itself (store.py); the provider only remembers
which images it holds for a revert.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import Any

import rbd
import structlog
from pydantic import BaseModel

from providers.base import (
    BlockReader,
    Capabilities,
    DiskSource,
    Extent,
    GroupSpec,
    Member,
    Provider,
    ReportProgress,
    SnapshotNotFound,
    Space,
    StoredGroup,
    Volume,
    VolumeChanged,
    VolumeNotFound,
)
from providers.ceph import changes, cloning, cutting, images, reverting, store
from providers.ceph.changes import View
from providers.ceph.cluster import Cluster
from providers.ceph.holding import Holds
from providers.ceph.options import CephOptions
from providers.ceph.reading import RbdReader
from providers.ceph.store import Manifest
from providers.extents import clipped
from providers.refusals import check_count, check_raw, not_in_journal

log = structlog.get_logger()

_MAX_MEMBERS = 128
_THREADS = 32
_YIELD_TO_CUTS_S = 3.0
_QUIET_INTERVALS = 2.2
"""A change of the OSD map is followed by another commit one interval later: the monitor's own log entry about the new
map (OSDMonitor::on_active). Only an interval after that one does the next change go out at once."""


class CephProvider(Provider):
    """See providers.base.Provider for what each verb promises."""

    Options = CephOptions

    def __init__(self, pool: str, options: CephOptions) -> None:
        """Take the pool's name and options; nothing is opened yet."""
        self._pool = pool
        self._options = options
        self._cluster = Cluster(pool, options)
        self._holds = Holds(self._cluster)
        self._about_to_cut: dict[str, float] = {}
        self._map_changed = -_QUIET_INTERVALS * options.commit_interval_s
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"{pool}-rbd")

    @classmethod
    def open_pool(cls, pool: str, options: BaseModel) -> CephProvider:
        """See Provider."""
        return cls(pool, CephOptions.model_validate(options.model_dump()))

    def capabilities(self) -> Capabilities:
        """See Provider."""
        return Capabilities(
            atomic_group=self._options.cut == "group",
            instant_cut=True,
            revert=True,
            instant_revert=self._options.cut == "parallel",
            clone=True,
            read_blocks=True,
            allocated_extents=True,
            changed_extents=True,
            max_members=_MAX_MEMBERS,
        )

    def space(self) -> Space:
        """See Provider."""
        return self._cluster.space()

    def volumes(self, after: str, limit: int) -> list[Volume]:
        """See Provider."""
        with self._cluster.opened() as context:
            names = sorted(found["name"] for found in rbd.RBD().list2(context))
            own_id, page = self._cluster.client_id(), []
            for name in names:
                if name <= after or name.startswith(".") or ".." in name:
                    continue
                with suppress(VolumeNotFound):  # deleted meanwhile
                    page.append(images.volume_of(context, name, own_id))
                if len(page) == limit:
                    break
        return page

    def volume(self, name: str) -> Volume:
        """See Provider."""
        with self._cluster.opened() as context:
            return images.volume_of(context, name, self._cluster.client_id())

    def resolve(self, source: DiskSource) -> str | None:
        """See Provider. The pool and namespace have to be ours, and one of the monitors, where any are named."""
        if source.rbd is None:
            return None
        *place, name = source.rbd.split("/")
        ours = [self._options.rbd_pool, *([self._options.namespace] if self._options.namespace else [])]
        if place != ours or name.startswith("."):
            return None
        if source.monitors and not self._cluster.has_monitor(source.monitors):
            return None
        with self._cluster.opened() as context:
            return name if images.current_id(context, name) else None

    def prepare(self, spec: GroupSpec) -> list[Member]:
        """See Provider. Waits until an earlier change of ours to the OSD map cannot delay the cut any more."""
        check_count(spec, _MAX_MEMBERS)
        check_raw(spec)
        with self._cluster.opened() as context:
            earlier = store.read(context, spec.group)
            if earlier and earlier.state == "settled":
                raise not_in_journal(spec.group)
            if earlier:
                cutting.remove(context, earlier, _silent)
            try:
                manifest = cutting.reserve(context, spec, self._options.cut, self._executor)
            except BaseException:
                self._remove_unfinished(context, spec.group)
                raise
        self._about_to_cut[spec.group] = time.monotonic()
        quiet = self._map_changed + _QUIET_INTERVALS * self._options.commit_interval_s
        time.sleep(max(0.0, quiet - time.monotonic()))
        return [self._member(manifest, part) for part in manifest.members]

    def cut(self, group: str) -> list[Member]:
        """See Provider."""
        try:
            with self._cluster.opened() as context:
                manifest = store.read(context, group)
                if manifest is None or manifest.state != "reserved":
                    raise VolumeChanged(f"the reservation of {group} is gone: prepare again", group=group)
                try:
                    with self._holds.lent({member.image_id for member in manifest.members}):
                        cutting.cut(context, manifest, self._executor)
                except BaseException:
                    self._remove_unfinished(context, group)
                    raise
        finally:
            self._about_to_cut.pop(group, None)
            self._map_changed = time.monotonic()
        return [self._member(manifest, part, cut=True) for part in manifest.members]

    def settle(self, group: str, cut_time: datetime, record: bytes, progress: ReportProgress) -> list[Member]:
        """See Provider."""
        with self._cluster.opened() as context:
            progress(0, 0)
            manifest = store.read(context, group)
            if manifest is None or manifest.state == "deleting":
                raise VolumeChanged(f"the cut of {group} did not survive", group=group)
            if manifest.state == "reserved":
                manifest = cutting.settle(context, manifest, cut_time, record.decode(), self._executor)
        return [self._member(manifest, part, cut=True) for part in manifest.members]

    def describe(self, group: str, record: bytes) -> None:
        """See Provider."""
        with self._cluster.opened() as context:
            manifest = store.settled(context, group)
            store.write(context, manifest.model_copy(update={"record": record.decode()}))

    def abort(self, group: str) -> None:
        """See Provider. What is settled is finished, and stays."""
        self._about_to_cut.pop(group, None)
        with self._cluster.opened() as context:
            self._abort(context, group)

    def check_deletable(self, group: str) -> None:
        """See Provider."""
        with self._cluster.opened() as context:
            manifest = store.read(context, group)
            if manifest and manifest.state == "settled":
                cutting.check_removable(context, manifest)

    def delete(self, group: str, progress: ReportProgress) -> None:
        """See Provider. Removing a snapshot changes the OSD map: it lets those go first who are about to cut."""
        with self._cluster.opened() as context:
            manifest = store.read(context, group)
            if manifest is None:
                store.remove(context, group)
                return
            if manifest.state != "deleting":
                manifest.state = "deleting"
                store.write(context, manifest)
            self._let_cuts_go_first(progress)
            try:
                cutting.remove(context, manifest, progress)
            finally:
                self._map_changed = time.monotonic()

    def prepare_revert(
        self, group: str, volumes: Sequence[str], progress: ReportProgress, *, instant: bool = False
    ) -> None:
        """See Provider. From here on until revert() nobody else can write to the volumes."""
        self.abort_revert(group)
        with self._cluster.opened() as context:
            manifest = store.settled(context, group)
            if not cutting.exists(context, manifest):
                raise SnapshotNotFound(f"the storage has lost the snapshot {group}", group=group)
            held = self._holds.take(context, group, volumes)
            try:
                progress(0, 0)
                if instant:
                    reverting.stage(self._cluster, context, manifest, volumes)
                else:
                    needed = reverting.find_windows(context, manifest, held, self._cluster.open_data, self._executor)
                    self._cluster.check_room(needed)
            except BaseException:
                self._holds.release(group)
                reverting.unstage(context, manifest)
                raise

    def revert(self, group: str, volumes: Sequence[str], progress: ReportProgress) -> None:
        """See Provider."""
        with self._cluster.opened() as context:
            manifest = store.settled(context, group)
            if reverting.is_staged(context, manifest, volumes):
                self._holds.release(group)
                for volume in volumes:
                    reverting.swap(context, manifest, volume)
                return
            held = self._holds.of(group)
            lost = [volume for volume in volumes if images.current_id(context, volume) is None]
            for volume in lost:
                reverting.bring_back(self._cluster, context, manifest, volume)
            if held is None or lost:  # resumed by another process, or some were not there to be held
                self._holds.release(group)
                held = self._holds.take(context, group, volumes)
                reverting.find_windows(context, manifest, held, self._cluster.open_data, self._executor)
            try:
                reverting.set_back(context, manifest, held, progress, self._cluster.open_data, self._executor)
            finally:
                self._holds.release(group)
                self._map_changed = time.monotonic()

    def abort_revert(self, group: str) -> None:
        """See Provider."""
        self._holds.release(group)
        with self._cluster.opened() as context:
            if manifest := store.read(context, group):
                reverting.unstage(context, manifest)

    def clone(self, group: str, volume: str, target: str, progress: ReportProgress) -> Volume:
        """See Provider. Copy-on-write where the snapshot can be cloned, else a full, sparse copy."""
        images.check_name(target)
        with self._cluster.opened() as context:
            manifest = store.settled(context, group)
            cloning.make_volume(self._cluster, context, manifest, volume, target, progress, self._executor)
            return images.volume_of(context, target, self._cluster.client_id())

    def open(self, group: str, volume: str) -> BlockReader:
        """See Provider."""
        with self._cluster.opened() as context:
            manifest = store.settled(context, group)
        return RbdReader(self._cluster, manifest, volume)

    def changed_extents(self, group: str, volume: str, base: str | None, *, coarse: bool = False) -> Iterator[Extent]:
        """See Provider. By diff_iterate where librbd can, else by the objects' versions (changes.py)."""
        with self._cluster.opened() as context:
            manifest = store.settled(context, group)
            member = manifest.member(volume)
            with images.opened_member(context, manifest, volume) as image:
                newer = View(image, member.snap_id)
                if base is None:
                    yield from changes.allocated(newer, 0, image.size(), coarse=coarse)
                    return
                older_manifest = store.settled(context, base)
                older_member = older_manifest.member(volume)
                same_image = older_member.image_id == member.image_id
                if same_image and older_member.kind == "snapshot" and older_member.snap_id < member.snap_id:
                    yield from changes.since_snapshot(newer, older_manifest.rbd_name, coarse=coarse)
                    return
                with images.opened_member(context, older_manifest, volume) as older_image:
                    older = View(older_image, older_member.snap_id)
                    found = changes.windows(older, newer, self._cluster.open_data, self._executor)
                    if coarse:
                        yield from clipped(found, image.size())
                    else:
                        yield from changes.exact(older, newer, found, self._executor)

    def snapshots(self) -> Iterator[StoredGroup]:
        """See Provider. A group that the cluster has lost snapshots of is left out, with a warning."""
        with self._cluster.opened() as context:
            for group in store.groups(context):
                try:
                    manifest = store.settled(context, group)
                except SnapshotNotFound as error:
                    log.warning("not a finished snapshot", pool=self._pool, group=group, error=str(error))
                    continue
                if not cutting.exists(context, manifest):
                    log.warning("the cluster has lost the snapshots", pool=self._pool, group=group)
                    continue
                members = tuple(self._member(manifest, part, cut=True) for part in manifest.members)
                yield StoredGroup(group, manifest.cut_time, members, manifest.record.encode())

    def leftovers(self) -> Iterator[str]:
        """See Provider. What is reserved or being deleted; a cut is listed before its RBD group is made."""
        with self._cluster.opened() as context:
            listed = store.groups(context)
            for group in listed:
                try:
                    store.settled(context, group)
                except SnapshotNotFound:
                    yield group

    def close(self) -> None:
        """See Provider."""
        self._holds.close()
        self._executor.shutdown(wait=False)

    def _member(self, manifest: Manifest, part: store.StoredMember, *, cut: bool = False) -> Member:
        place = "/".join(filter(None, (self._options.rbd_pool, self._options.namespace)))
        in_group = part.kind == "group"
        name = f"{manifest.rbd_name}@{cutting.SNAPSHOT}" if in_group else f"{part.volume}@{manifest.rbd_name}"
        handle = f"{place}/{name}" if cut else ""
        return Member(part.volume, part.size_bytes, "raw", part.kind, handle, atomic=in_group)

    def _abort(self, context: Any, group: str) -> None:
        manifest = store.read(context, group)
        if manifest is None:
            store.remove(context, group)
        elif manifest.state != "settled":
            cutting.remove(context, manifest, _silent)

    def _remove_unfinished(self, context: Any, group: str) -> None:
        """Leave nothing of a verb that failed; what cannot be removed now the gateway has removed by abort()."""
        with suppress(Exception):
            self._abort(context, group)

    def _let_cuts_go_first(self, progress: ReportProgress) -> None:
        deadline = time.monotonic() + _YIELD_TO_CUTS_S
        while self._about_to_cut and time.monotonic() < deadline:
            progress(0, 0)
            time.sleep(0.05)


def _silent(_done: int, _total: int) -> None:
    """Report to nobody."""
