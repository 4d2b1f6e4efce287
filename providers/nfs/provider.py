"""The nfs provider: image files directly in one directory, of an NFS mount or any local file system.

A cut is a clone (FICLONE) where the file system can; elsewhere a volume that nobody uses is locked and copied
afterwards. Snapshots lie in .frostgate beside the volumes (layout.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

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
    ProviderError,
    ReportProgress,
    SnapshotExists,
    SnapshotNotFound,
    Space,
    StoredGroup,
    Volume,
    VolumeChanged,
    VolumeNotFound,
)
from providers.nfs import (
    blocks,
    chains,
    changes,
    cloning,
    imagelock,
    layout,
    locks,
    probing,
    qemu,
    reservation,
    reverting,
)
from providers.nfs.backup import Backups
from providers.nfs.beneath import check_name, directory, is_volume_name, open_volume, storage_errors
from providers.nfs.images import format_of, virtual_size
from providers.nfs.ongoing import Ongoing
from providers.nfs.options import NfsOptions
from providers.refusals import check_count, not_in_journal

log = structlog.get_logger()

_MAX_MEMBERS = 128


class NfsProvider(Provider):
    """See providers.base.Provider for what each verb promises."""

    Options = NfsOptions

    def __init__(self, pool: str, options: NfsOptions) -> None:
        """Take the pool's name and options; nothing is opened yet."""
        self._pool = pool
        self._options = options
        self._root = options.root
        self._ongoing = Ongoing()
        self._can_clone: dict[int, bool] = {}
        self._backups = Backups(pool, options.hypervisors, options.max_incrementals, self.resolve)
        self._cutters = ThreadPoolExecutor(8, thread_name_prefix=f"{pool}-clone")

    @classmethod
    def open_pool(cls, pool: str, options: BaseModel) -> NfsProvider:
        """See Provider."""
        return cls(pool, NfsOptions.model_validate(options.model_dump()))

    def capabilities(self) -> Capabilities:
        """See Provider. Instant where the file system clones files."""
        with self._opened() as root:
            instant = self._clones(root)
        return Capabilities(
            instant_cut=instant,
            revert=True,
            instant_revert=instant,
            read_blocks=True,
            clone=True,
            allocated_extents=True,
            changed_extents=True,
            max_members=_MAX_MEMBERS,
        )

    def space(self) -> Space:
        """See Provider."""
        with self._opened() as root:
            found = os.fstatvfs(root)
        return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    def volumes(self, after: str, limit: int) -> list[Volume]:
        """See Provider. Regular files directly in the root whose names can be volumes'."""
        with self._opened() as root:
            names = sorted(
                entry.name
                for entry in os.scandir(root)
                if entry.name > after and is_volume_name(entry.name) and entry.is_file(follow_symlinks=False)
            )
            found = []
            for name in names:
                try:
                    found.append(self._volume(root, name))
                except VolumeNotFound:
                    continue  # deleted meanwhile
                if len(found) == limit:
                    break
        return found

    def volume(self, name: str) -> Volume:
        """See Provider."""
        with self._opened() as root:
            return self._volume(root, name)

    def resolve(self, source: DiskSource) -> str | None:
        """See Provider. The path has to lead directly into the root, as we or the hypervisors name it."""
        if source.file is None:
            return None
        path = Path(source.file)
        if ".." in path.parts or not path.is_absolute() or not is_volume_name(path.name):
            return None
        with self._opened() as root:
            if path.parent not in (self._root, *self._options.hypervisor_paths):
                try:
                    parent, ours = path.parent.stat(), os.fstat(root)
                except OSError:
                    return None
                if (parent.st_dev, parent.st_ino) != (ours.st_dev, ours.st_ino):
                    return None
            try:
                os.close(open_volume(root, path.name))
            except VolumeNotFound:
                return None
        return path.name

    def prepare(self, spec: GroupSpec) -> list[Member]:
        """See Provider."""
        check_count(spec, _MAX_MEMBERS)
        earlier = self._ongoing.reservation(spec.group)
        if earlier and earlier.spec == spec:
            return [reservation.member_of(part.stored) for part in earlier.parts]
        self._ongoing.forget(spec.group)
        with self._opened() as root, ExitStack() as held:
            lock = held.enter_context(self._ongoing.lock(root, spec.group))
            self._refuse_stored(root, spec.group)
            if layout.is_there(root, spec.group):  # by a gateway that died
                self._backups.cancel(root, spec.group)
                layout.remove_group(root, spec.group)
            try:
                reserved = reservation.reserve(
                    root,
                    spec,
                    self._options.default_format,
                    (self._root, *self._options.hypervisor_paths),
                    self._backups,
                    cloning=self._clones(root),
                    reverting=self._ongoing.volumes_reverting(),
                )
            except BaseException:
                layout.remove_group(root, spec.group)
                raise
            held.pop_all()
        self._ongoing.keep(spec.group, reserved, lock)
        return [reservation.member_of(part.stored) for part in reserved.parts]

    def cut(self, group: str) -> list[Member]:
        """See Provider."""
        reserved = self._ongoing.reservation(group)
        if reserved is None:
            raise VolumeChanged(f"the reservation of {group} is gone: prepare again", group=group)
        try:
            with storage_errors(self._root):
                reservation.cut(reserved, self._cutters, self._backups)
        except BaseException:
            self.abort(group)
            raise
        return [self._member(group, part.stored) for part in reserved.parts]

    def settle(self, group: str, cut_time: datetime, record: bytes, progress: ReportProgress) -> list[Member]:
        """See Provider."""
        with self._opened() as root:
            reserved = self._ongoing.cut_reservation(root, group)
            if reserved is None:
                manifest = layout.manifest(root, group)  # settled before the crash
            else:
                try:
                    manifest = reservation.settle(reserved, cut_time, record.decode(), self._backups, progress)
                except OSError as error:
                    if error.errno == errno.ESTALE:  # what is open is of a mount that is gone: a repeat opens it anew
                        self._ongoing.forget(group)
                    raise
                self._ongoing.forget(group)
        return [self._member(group, member) for member in manifest.members]

    def describe(self, group: str, record: bytes) -> None:
        """See Provider."""
        with self._opened() as root:
            layout.manifest(root, group)  # before the lock: it makes `.frostgate`
            with self._ongoing.describing(root, group):
                manifest = layout.manifest(root, group)
                with directory(layout.group_path(group), root) as group_fd:
                    layout.write(group_fd, layout.MANIFEST, manifest.model_copy(update={"record": record.decode()}))

    def abort(self, group: str) -> None:
        """See Provider. What has a manifest is finished, and stays."""
        self._ongoing.forget(group)
        with self._opened() as root:
            if not layout.is_there(root, group):
                layout.sync_snapshots(root)  # so that a repeat of one that failed is durable too
                return
            with self._ongoing.locked(root, group):
                if not layout.is_finished(root, group):
                    self._backups.cancel(root, group)
                    layout.remove_group(root, group)

    def delete(self, group: str, progress: ReportProgress) -> None:
        """See Provider."""
        self._ongoing.forget(group)
        self._ongoing.end_revert(group)
        with self._opened() as root:
            progress(0, 0)
            if not layout.is_there(root, group):
                layout.sync_snapshots(root)
                return
            with self._ongoing.locked(root, group):
                layout.remove_group(root, group)

    def prepare_revert(
        self, group: str, volumes: Sequence[str], progress: ReportProgress, *, instant: bool = False
    ) -> None:
        """See Provider. From here on until revert() nobody can open the volumes for writing."""
        self._ongoing.end_revert(group)
        with self._opened() as root:
            layout.manifest(root, group)
            self._ongoing.begin_revert(root, group, volumes)
            try:
                reverting.stage(root, group, volumes, progress, cloning=self._clones(root), instant=instant)
            except BaseException:
                self._ongoing.end_revert(group)
                raise

    def revert(self, group: str, volumes: Sequence[str], progress: ReportProgress) -> None:
        """See Provider."""
        with self._opened() as root:
            self._ongoing.begin_revert(root, group, volumes)  # when it is resumed by another process
            try:
                reverting.swap(root, group)
            except OSError as error:
                if error.errno == errno.ESTALE:  # and so are the locks: a repeat takes them anew
                    self._ongoing.end_revert(group)
                raise
        self._ongoing.end_revert(group)

    def abort_revert(self, group: str) -> None:
        """See Provider."""
        self._ongoing.end_revert(group)
        with self._opened() as root:
            if layout.is_there(root, group):
                with self._ongoing.locked(root, group):
                    reverting.abort(root, group)

    def clone(self, group: str, volume: str, target: str, progress: ReportProgress) -> Volume:
        """See Provider. At once where the file system clones files."""
        with self._opened() as root:
            default = self._options.default_format
            layout.manifest(root, group)  # before the lock: it makes `.frostgate`
            with self._ongoing.cloning(root, group):
                cloning.clone(root, group, volume, target, default, progress, cloning=self._clones(root))
            return self._volume(root, target)

    def open(self, group: str, volume: str) -> BlockReader:
        """See Provider."""
        with self._opened() as root, self._chain(root, group, volume) as chain:
            return blocks.reader(chain)

    def changed_extents(self, group: str, volume: str, base: str | None, *, coarse: bool = False) -> Iterator[Extent]:
        """See Provider. `coarse` reads nothing where the file system clones files."""
        with self._opened() as root, self._chain(root, group, volume) as chain, blocks.reader(chain) as reader:
            if base is None:
                yield from reader.extents(0, reader.size_bytes)
                return
            with self._chain(root, base, volume) as base_chain, blocks.reader(base_chain) as base_reader:
                newer, older = changes.Side(chain, reader), changes.Side(base_chain, base_reader)
                yield from changes.changed(newer, older, cloning=self._clones(root), coarse=coarse)

    def snapshots(self) -> Iterator[StoredGroup]:
        """See Provider. A manifest that cannot be read is left out, with a warning."""
        with self._opened() as root:
            for group in layout.groups(root):
                if not layout.is_finished(root, group):
                    continue
                try:
                    manifest = layout.manifest(root, group)
                except SnapshotNotFound as error:
                    log.warning("not a finished snapshot", pool=self._pool, group=group, error=str(error))
                    continue
                members = tuple(self._member(group, member) for member in manifest.members)
                yield StoredGroup(group, manifest.cut_time, members, manifest.record.encode())

    def leftovers(self) -> Iterator[str]:
        """See Provider. What another gateway is at work on is none."""
        with self._opened() as root:
            for group in layout.groups(root):
                if not layout.is_finished(root, group) and not locks.is_held(root, group):
                    yield group

    def close(self) -> None:
        """See Provider."""
        self._ongoing.close()
        self._cutters.shutdown(wait=False)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        with storage_errors(self._root), directory(self._root) as root:
            yield root

    @contextmanager
    def _chain(self, root: int, group: str, volume: str) -> Iterator[qemu.Chain]:
        """Yield the files that have a member's bytes, open."""
        member = layout.manifest(root, group).member(volume)
        with layout.group_directory(root, group) as group_fd:
            if group_fd is None:
                raise SnapshotNotFound(f"the storage has no snapshot {group}", group=group)
            with chains.member(group_fd, member) as chain:
                yield chain

    def _clones(self, root: int) -> bool:
        device = os.fstat(root).st_dev
        if device not in self._can_clone:
            self._can_clone[device] = probing.can_clone(root)
        return self._can_clone[device]

    def _volume(self, root: int, name: str) -> Volume:
        check_name(name)
        descriptor = open_volume(root, name)
        try:
            image_format = format_of(name, None, self._options.default_format)
            status = os.fstat(descriptor)
            try:
                size = virtual_size(descriptor, name, image_format)
            except ProviderError:
                size = status.st_size  # a file that only has the suffix: listed, and refused by prepare()
            in_use = imagelock.is_in_use(descriptor)
            users = imagelock.users(descriptor) if in_use else ()
            return Volume(name, size, status.st_blocks * 512, image_format, in_use, users)
        finally:
            os.close(descriptor)

    def _member(self, group: str, stored: layout.StoredMember) -> Member:
        path = f"{layout.group_path(group)}/{stored.volume}"
        local_path = "" if stored.backup and (stored.image_format or stored.backing) else str(self._root / path)
        return reservation.member_of(stored, path, local_path)

    def _refuse_stored(self, root: int, group: str) -> None:
        if not layout.is_finished(root, group):
            return
        try:
            layout.manifest(root, group)
        except SnapshotNotFound as error:
            raise SnapshotExists(f"{error.message}; look at it, remove it, or choose another id", group=group) from None
        raise not_in_journal(group)
