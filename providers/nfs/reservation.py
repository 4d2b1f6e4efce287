"""One group snapshot on its way: what prepare() opened, so that the cut is one ioctl a volume.

prepare  opens every volume and makes its empty member file
cut      clones (or locks, when the file system cannot clone), all or none
settle   copies what was only locked, fsyncs, and writes the manifest last
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from providers.base import GroupSpec, Member, ReportProgress, VolumeChanged, VolumeNotFound, VolumeSpec
from providers.nfs import backup, chains, copying, imagelock, layout, locks, qcow2
from providers.nfs.beneath import close_all, directory, open_beneath, open_file, open_volume
from providers.nfs.images import Format, format_of, virtual_size
from providers.parallel import together

Mode: TypeAlias = Literal["clone", "backup", "copy", "copy-inside"]


@dataclass
class Part:
    """One volume of a reservation and its member file, both open. `header` is a qcow2 volume's at prepare."""

    stored: layout.StoredMember
    source: int
    target: int
    header: qcow2.Header | None = None
    lost: bool = False

    def close(self) -> None:
        """Close both; ends the lock on the volume."""
        close_all(descriptor for descriptor in (self.source, self.target) if descriptor >= 0)
        self.source = self.target = -1


@dataclass
class Reservation:
    """What is open for one group, and the locks that keep other gateways away. Used by one thread at a time."""

    spec: GroupSpec
    root: int = -1
    directory: int = -1
    parts: list[Part] = field(default_factory=list)
    was_cut: bool = False
    group_lock: locks.Held | None = None
    volumes_lock: locks.Held | None = None

    def close(self) -> None:
        """Close everything; what is on the storage stays."""
        for part in self.parts:
            part.close()
        close_all(descriptor for descriptor in (self.root, self.directory) if descriptor >= 0)
        for lock in (self.volumes_lock, self.group_lock):
            if lock:
                lock.close()
        self.root = self.directory = -1
        self.parts = []


def reserve(
    root_fd: int,
    spec: GroupSpec,
    default_format: Format,
    mounts: Sequence[Path],
    backups: backup.Backups,
    *,
    cloning: bool,
    reverting: Collection[str] = (),
) -> Reservation:
    """Open every volume, make its member file and keep its backing files. The caller has the group's lock.

    `mounts` are the paths under which hypervisors and we see the root; `reverting` volumes that this gateway is about
    to revert: locked already. The caller removes the group's directory when this raises: VolumeNotFound, VolumeInUse,
    VmBusy, InvalidName, CapabilityMissing, PoolFull, PoolUnavailable, OSError.
    """
    reservation = Reservation(spec)
    try:
        names = [volume.name for volume in spec.volumes if volume.name not in reverting]
        reservation.volumes_lock = locks.volumes(root_fd, names, reverting=False)
        for volume in spec.volumes:
            source = open_volume(root_fd, volume.name)
            try:
                stored = _checked(source, volume, spec.allow_copy, default_format, cloning)
                if not cloning:
                    _let_hypervisor_cut(root_fd, spec, volume, source, stored, backups)
            except BaseException:
                close_all([source])
                raise
            reservation.parts.append(Part(stored, source, -1))
        if not cloning:
            _check_room(root_fd, reservation.parts)
        layout.make_directory(root_fd, layout.group_path(spec.group))
        reservation.root = os.dup(root_fd)
        reservation.directory = open_beneath(root_fd, layout.group_path(spec.group), os.O_RDONLY | os.O_DIRECTORY)
        for part in reservation.parts:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            part.target = open_beneath(reservation.directory, part.stored.volume, flags, 0o600)
            _make_member(root_fd, reservation.directory, part, mounts, cloning)
        _note_hypervisors(reservation, backups)
        if cloning:
            for part in reservation.parts:
                os.fdatasync(part.source)  # a clone writes dirty pages back first: do that before the freeze
    except BaseException:
        reservation.close()
        raise
    return reservation


def _make_member(root_fd: int, group_fd: int, part: Part, mounts: Sequence[Path], cloning: bool) -> None:
    """Do with a member's empty file what can be done before the cut."""
    member = part.stored
    if member.format == "qcow2":
        part.header = qcow2.header(part.source, member.volume)
    if member.backup:
        backup.make_target(root_fd, group_fd, part.target, member)
    elif member.format == "qcow2":
        with chains.opened(root_fd, member.volume, part.source, mounts) as backing:
            member.backing = chains.keep(group_fd, backing, cloning=cloning)


def _note_hypervisors(reservation: Reservation, backups: backup.Backups) -> None:
    """Write down which jobs will run where, before one does: whoever finds it can end them."""
    members = [part.stored for part in reservation.parts if part.stored.backup]
    if members:
        layout.write(reservation.directory, layout.BACKUP, layout.Cut(members=members))
        backups.register(reservation.spec.group, members)


def _checked(
    source: int, volume: VolumeSpec, allow_copy: bool, default_format: Format, cloning: bool
) -> layout.StoredMember:
    image_format = format_of(volume.name, volume.format, default_format)
    mode: Mode = "clone"
    if not cloning:
        mode = "copy-inside" if allow_copy and imagelock.is_in_use(source) else "copy"
    return layout.StoredMember(
        volume=volume.name,
        size_bytes=virtual_size(source, volume.name, image_format),
        format=image_format,
        mode=mode,
        attributes=layout.Attributes.of(source),
        file_bytes=os.fstat(source).st_size,
    )


def _let_hypervisor_cut(
    root_fd: int,
    spec: GroupSpec,
    volume: VolumeSpec,
    source: int,
    member: layout.StoredMember,
    backups: backup.Backups,
) -> None:
    """Make a member one of backup mode when its VM runs, or raise VolumeInUse when nothing else lets it be cut."""
    if volume.attachment and backups.uri(volume.attachment):
        member.backup = backups.planned(root_fd, spec.group, volume.name, source, member.format, volume.attachment)
    if member.backup:
        member.mode = "backup"
        member.image_format = "" if member.format == "qcow2" else "qcow2"
        member.atomic = len({attached.domain for one in spec.volumes if (attached := one.attachment)}) == 1
    elif member.mode == "copy" and imagelock.is_in_use(source):
        error = imagelock.in_use(source, volume.name)
        error.message += (
            f" (this file system cannot clone files), {backups.advice(volume.attachment)}, "
            "or allow the copy inside the freeze window (allow_copy)"
        )
        raise error


def _check_room(root_fd: int, parts: Sequence[Part]) -> None:
    needed = 0
    for part in parts:
        planned = part.stored.backup
        needed += planned.changed_bytes if planned and planned.base else os.fstat(part.source).st_blocks * 512
    copying.check_room(root_fd, needed, "copying the volumes")


def cut(reservation: Reservation, executor: Executor, backups: backup.Backups) -> None:
    """Fix every volume's content, all or none; neither syncs nor, unless the caller allowed it, copies.

    Raises VolumeChanged, VolumeNotFound, VolumeInUse, VmBusy, PoolFull, PoolUnavailable, OSError; the caller then
    aborts.
    """
    if reservation.was_cut:
        return
    parts = reservation.parts
    for part in parts:
        _check_same_file(reservation.root, part)
    by_hypervisors = [part.stored for part in parts if part.stored.backup]
    work = [partial(_cut_part, part) for part in parts if not part.stored.backup]
    if by_hypervisors:
        work.append(partial(backups.cut, reservation.spec.group, by_hypervisors))
    together(executor, work)  # all have ended when one fails: the caller closes what they work on
    for part in parts:
        # a clone's own size: a qcow2 volume may have grown since
        part.stored.file_bytes = os.fstat(part.target if part.stored.mode == "clone" else part.source).st_size
        part.stored.mtime_ns = os.fstat(part.source).st_mtime_ns
    cut_record = layout.Cut(members=[part.stored for part in parts], boot=layout.boot())
    layout.write(reservation.directory, layout.CUT, cut_record, durable=False)
    reservation.was_cut = True
    if reservation.volumes_lock:
        reservation.volumes_lock.close()


def _cut_part(part: Part) -> None:
    if part.stored.mode == "clone":
        copying.clone(part.source, part.target)
    elif part.stored.mode == "copy":
        imagelock.hold(part.source, part.stored.volume)
    else:
        copying.copy(part.source, part.target, lambda _done: None)


def _check_same_file(root_fd: int, part: Part) -> None:
    """Raise VolumeNotFound when the name is gone, VolumeChanged when it is another file now or has another size."""
    volume = part.stored.volume
    try:
        current = os.stat(volume, dir_fd=root_fd, follow_symlinks=False)
    except FileNotFoundError:
        raise VolumeNotFound(f"volume {volume} is gone since it was prepared", volume=volume) from None
    opened = os.fstat(part.source)
    if (current.st_dev, current.st_ino) != (opened.st_dev, opened.st_ino):
        raise VolumeChanged(f"volume {volume} was replaced by another file since it was prepared", volume=volume)
    if part.stored.format == "raw":
        if opened.st_size != part.stored.file_bytes:
            raise VolumeChanged(f"volume {volume} was resized since it was prepared", volume=volume)
    else:
        _check_header(part, part.source)


def _check_header(part: Part, descriptor: int) -> None:
    """Raise VolumeChanged when a qcow2 image has another size or backing file than at prepare."""
    volume = part.stored.volume
    now, then = qcow2.header(descriptor, volume), part.header
    if then and now.size_bytes != then.size_bytes:
        raise VolumeChanged(f"volume {volume} was resized since it was prepared", volume=volume)
    if then and now != then:
        raise VolumeChanged(f"volume {volume} has another backing file since it was prepared", volume=volume)


def reopen(root_fd: int, group: str) -> Reservation:
    """Return the reservation of a group that was cut before this process started. The caller has the group's lock.

    Raises VolumeChanged when the cut did not survive: its record is missing, this host was booted since and not all
    of it was on the disk, or a volume that was still to be copied was written to.
    """
    lost = VolumeChanged(f"the cut of {group} did not survive the restart", group=group)
    reservation = Reservation(GroupSpec(group, ()), was_cut=True)
    try:
        with directory(layout.group_path(group), root_fd) as group_fd:
            members = _what_was_cut(group_fd)
            reservation.root, reservation.directory = os.dup(root_fd), os.dup(group_fd)
        for member in members:
            target = open_file(reservation.directory, member.volume, os.O_RDWR)
            part = Part(member, -1, target)
            reservation.parts.append(part)
            if member.backup:
                continue  # whether its job goes on is seen when it is waited for
            if member.mode == "copy":
                part.source = open_volume(root_fd, member.volume)
                imagelock.hold(part.source, member.volume)
                _check_unwritten(part)
            else:
                _check_whole(part, lost)
    except (FileNotFoundError, layout.Damaged):
        reservation.close()
        raise lost from None
    except BaseException:
        reservation.close()
        raise
    return reservation


def _what_was_cut(group_fd: int) -> list[layout.StoredMember]:
    """Raise Damaged when it did not survive, OSError."""
    found = layout.read(group_fd, layout.CUT, layout.Cut)
    if found is None or found.boot not in ("", layout.boot()):
        raise layout.Damaged("no cut of this boot")
    return found.members


def _check_whole(part: Part, lost: VolumeChanged) -> None:
    """Raise unless a clone survived: the file system sets its size in the cut's last step."""
    if os.fstat(part.target).st_size != part.stored.file_bytes:
        raise lost


def _check_unwritten(part: Part) -> None:
    status = os.fstat(part.source)
    if (status.st_size, status.st_mtime_ns) != (part.stored.file_bytes, part.stored.mtime_ns):
        volume = part.stored.volume
        raise VolumeChanged(f"volume {volume} was written to before its copy was complete", volume=volume)


def settle(
    reservation: Reservation, cut_time: datetime, record: str, backups: backup.Backups, progress: ReportProgress
) -> layout.Manifest:
    """Copy what was only locked, wait for hypervisors, make everything durable, write the manifest.

    Raises VolumeChanged, CopyFailed, PoolFull, PoolUnavailable, Cancelled, OSError.
    """
    if any(part.lost for part in reservation.parts):
        raise VolumeChanged(f"the storage could not write what was cut for {reservation.spec.group}")
    locked = [part for part in reservation.parts if part.stored.mode == "copy"]
    total = sum(os.fstat(part.source).st_blocks * 512 for part in locked)
    copied = copying.Copied(progress, total)
    if locked:
        _keep_sources(reservation, locked)
    for part in locked:
        copying.copy(part.source, part.target, copied.add)
        _check_unwritten(part)
    by_hypervisors = [part.stored for part in reservation.parts if part.stored.backup]
    if by_hypervisors:
        done = copied.done_bytes
        backups.wait(reservation.spec.group, by_hypervisors, lambda part, whole: progress(done + part, total + whole))
    for part in reservation.parts:
        if part.stored.backup:
            _take_back(reservation, part)
        elif part.stored.format == "qcow2":
            _check_header(part, part.target)
        os.fchmod(part.target, 0o400)
        _sync(reservation, part)
        chains.settle(reservation.directory, part.stored)
        if not part.stored.backup:
            part.stored.size_bytes = virtual_size(part.target, part.stored.volume, part.stored.format)
    # the names, from the members' up: when the manifest's is there, so are theirs
    os.fsync(reservation.directory)
    layout.sync_snapshots(reservation.root)
    os.fsync(reservation.root)
    members = [part.stored for part in reservation.parts]
    manifest = layout.Manifest(group=reservation.spec.group, cut_time=cut_time, members=members, record=record)
    layout.write(reservation.directory, layout.MANIFEST, manifest)
    layout.remove(reservation.directory, layout.CUT)
    if by_hypervisors:
        backups.supersede(reservation.spec.group, by_hypervisors)
        layout.remove(reservation.directory, layout.BACKUP)
    return manifest


def _take_back(reservation: Reservation, part: Part) -> None:
    """Open a member anew that a hypervisor has filled: over NFS that shows what another host wrote."""
    before, part.target = part.target, open_file(reservation.directory, part.stored.volume, os.O_RDWR)
    os.close(before)
    backup.finish_target(part.target, part.stored)


def _keep_sources(reservation: Reservation, copied: Sequence[Part]) -> None:
    """Let the cut outlive a power cut while it is copied, when nothing else is lost with it.

    The volumes are locked and unwritten: what they were at the cut is in them, once it is on the disk.
    """
    for part in copied:
        os.fsync(part.source)
    if len(copied) == len(reservation.parts) and not any(part.stored.backing for part in copied):
        os.fsync(reservation.directory)
        layout.sync_snapshots(reservation.root)
        os.fsync(reservation.root)
        layout.write(reservation.directory, layout.CUT, layout.Cut(members=[part.stored for part in copied]))


def _sync(reservation: Reservation, part: Part) -> None:
    """Make a member durable. What the system could not write it forgets, and says so once: then the cut is lost."""
    try:
        os.fsync(part.target)
    except OSError:
        if part.stored.mode != "copy":
            layout.remove(reservation.directory, layout.CUT)
            part.lost = True
        raise


def member_of(stored: layout.StoredMember, handle: str = "", local_path: str = "") -> Member:
    """Return a stored member as the interface has it."""
    return Member(
        stored.volume, stored.size_bytes, stored.format, stored.mode, handle, local_path, atomic=stored.atomic
    )
