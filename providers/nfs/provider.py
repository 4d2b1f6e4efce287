"""The nfs provider: image files directly in one directory, of an NFS mount or any local file system.

A cut is a clone (FICLONE) where the file system can; elsewhere a volume that nobody uses is locked and copied
afterwards. Snapshots lie in .frostgate beside the volumes (layout.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import AfterValidator, BaseModel, ConfigDict

from providers.base import (
    BlockReader,
    Capabilities,
    DiskSource,
    Extent,
    GroupSpec,
    LimitExceeded,
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
from providers.nfs import blocks, chains, changes, cloning, copying, imagelock, layout, qemu, reservation, reverting
from providers.nfs.beneath import check_name, directory, is_volume_name, open_volume, storage_errors
from providers.nfs.images import Format, format_of, virtual_size

log = structlog.get_logger()

_MAX_MEMBERS = 128


def _absolute(path: Path) -> Path:
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError("has to be an absolute path without '..'")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class NfsOptions(BaseModel):
    """`root`: where this host sees the directory. `hypervisor_paths`: other paths under which hypervisors do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: AbsolutePath
    hypervisor_paths: tuple[AbsolutePath, ...] = ()
    default_format: Format = "raw"


class NfsProvider(Provider):
    """See providers.base.Provider for what each verb promises."""

    Options = NfsOptions

    def __init__(self, pool: str, options: NfsOptions) -> None:
        """Take the pool's name and options; nothing is opened yet."""
        self._pool = pool
        self._options = options
        self._root = options.root
        self._lock = threading.Lock()
        self._reservations: dict[str, reservation.Reservation] = {}
        self._reverts: dict[str, list[int]] = {}
        self._can_clone: dict[int, bool] = {}
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
        if len(spec.volumes) > _MAX_MEMBERS:
            raise LimitExceeded(f"at most {_MAX_MEMBERS} volumes", limit="max_members", maximum=str(_MAX_MEMBERS))
        with self._lock:
            earlier = self._reservations.get(spec.group)
        if earlier and earlier.spec == spec:
            return [reservation.member_of(part.stored) for part in earlier.parts]
        with self._opened() as root:
            self._refuse_stored(root, spec.group)
            self._forget(spec.group)
            try:
                mounts = (self._root, *self._options.hypervisor_paths)
                reserved = reservation.reserve(
                    root, spec, self._options.default_format, mounts, cloning=self._clones(root)
                )
            except BaseException:
                layout.remove_group(root, spec.group)
                raise
        with self._lock:
            self._reservations[spec.group] = reserved
        return [reservation.member_of(part.stored) for part in reserved.parts]

    def cut(self, group: str) -> list[Member]:
        """See Provider."""
        with self._lock:
            reserved = self._reservations.get(group)
        if reserved is None:
            raise VolumeChanged(f"the reservation of {group} is gone: prepare again", group=group)
        try:
            with storage_errors(self._root):
                try:
                    reservation.cut(reserved, self._cutters)
                except FileNotFoundError as error:
                    raise VolumeNotFound(
                        f"volume {error.filename} is gone since it was prepared", volume=str(error.filename)
                    ) from None
        except BaseException:
            self.abort(group)
            raise
        return [self._member(group, part.stored) for part in reserved.parts]

    def settle(self, group: str, cut_time: datetime, record: bytes, progress: ReportProgress) -> list[Member]:
        """See Provider."""
        with self._opened() as root:
            with self._lock:
                reserved = self._reservations.get(group)
            if reserved is None:
                try:
                    manifest = layout.manifest(root, group)  # settled before the crash
                except SnapshotNotFound:
                    reserved = reservation.reopen(root, group)
                    with self._lock:
                        self._reservations[group] = reserved
            if reserved is not None:
                manifest = reservation.settle(reserved, cut_time, record.decode(), progress)
                self._forget(group)
        return [self._member(group, member) for member in manifest.members]

    def describe(self, group: str, record: bytes) -> None:
        """See Provider."""
        with self._opened() as root:
            manifest = layout.manifest(root, group)
            with layout.group_directory(root, group) as group_fd:
                if group_fd is None:
                    raise SnapshotNotFound(f"the storage has no snapshot {group}", group=group)
                layout.write(group_fd, layout.MANIFEST, manifest.model_copy(update={"record": record.decode()}))

    def abort(self, group: str) -> None:
        """See Provider. What has a manifest is finished, and stays."""
        self._forget(group)
        with self._opened() as root:
            with layout.group_directory(root, group) as group_fd:
                finished = group_fd is not None and layout.read(group_fd, layout.MANIFEST) is not None
            if not finished:
                layout.remove_group(root, group)

    def delete(self, group: str, progress: ReportProgress) -> None:
        """See Provider."""
        self._forget(group)
        with self._opened() as root:
            progress(0, 0)
            layout.remove_group(root, group)

    def prepare_revert(
        self, group: str, volumes: Sequence[str], progress: ReportProgress, *, instant: bool = False
    ) -> None:
        """See Provider. From here on until revert() nobody can open the volumes for writing."""
        self.abort_revert(group)
        with self._opened() as root:
            held = reverting.lock(root, volumes)
            with self._lock:
                self._reverts[group] = held
            try:
                reverting.stage(root, group, volumes, progress, cloning=self._clones(root), instant=instant)
            except BaseException:
                self._unlock(group)
                raise

    def revert(self, group: str, volumes: Sequence[str], progress: ReportProgress) -> None:
        """See Provider."""
        with self._opened() as root:
            with self._lock:
                locked = group in self._reverts
            if not locked:  # resumed by another process
                held = reverting.lock(root, volumes)
                with self._lock:
                    self._reverts[group] = held
            reverting.swap(root, group)
        self._unlock(group)

    def abort_revert(self, group: str) -> None:
        """See Provider."""
        self._unlock(group)
        with self._opened() as root:
            reverting.abort(root, group)

    def clone(self, group: str, volume: str, target: str, progress: ReportProgress) -> Volume:
        """See Provider. At once where the file system clones files."""
        with self._opened() as root:
            default = self._options.default_format
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
            for group in layout.groups(self._root):
                try:
                    manifest = layout.manifest(root, group)
                except SnapshotNotFound as error:
                    log.warning("not a finished snapshot", pool=self._pool, group=group, error=str(error))
                    continue
                members = tuple(self._member(group, member) for member in manifest.members)
                yield StoredGroup(group, manifest.cut_time, members, manifest.record.encode())

    def close(self) -> None:
        """See Provider."""
        for group in list(self._reservations):
            self._forget(group)
        for group in list(self._reverts):
            self._unlock(group)
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
            self._can_clone[device] = copying.can_clone(self._root)
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
        return reservation.member_of(stored, path, str(self._root / path))

    def _refuse_stored(self, root: int, group: str) -> None:
        with layout.group_directory(root, group) as group_fd:
            if group_fd is not None and layout.read(group_fd, layout.MANIFEST) is not None:
                raise SnapshotExists(
                    f"the storage has a snapshot {group} that this gateway's journal does not know: "
                    "run `frostgate reconcile`, or choose another id",
                    group=group,
                )

    def _forget(self, group: str) -> None:
        with self._lock:
            reserved = self._reservations.pop(group, None)
        if reserved:
            reserved.close()

    def _unlock(self, group: str) -> None:
        with self._lock:
            held: list[int] = self._reverts.pop(group, [])
        reverting.unlock(held)
