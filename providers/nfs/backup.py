"""Backup mode: volumes of a running VM on a file system that cannot clone are cut by their hypervisor.

prepare  checks the attachment against the live XML, finds the snapshot on which this one can lie, makes the images
         that QEMU will fill, and notes what will run where
cut      begins one backup job for all disks of the VM (jobs.py)
settle   waits for its end

A member is a qcow2 image, whatever the volume's format: sparse on every file system. It has what changed since the
newest snapshot whose checkpoint the VM still has (checkpoints.py), whose files are linked into the group as its
backing files; or everything.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import structlog

from providers.base import (
    Attachment,
    CapabilityMissing,
    CopyFailed,
    DiskSource,
    PoolUnavailable,
    ProviderError,
    ReportProgress,
    VolumeInUse,
)
from providers.nfs import chains, checkpoints, hypervisors, jobs, layout, qcow2, qemu
from providers.nfs.beneath import directory

log = structlog.get_logger()

_SECTOR = 512
_CREATE_TIMEOUT_S = 20.0
_ENCRYPTION_AT, _SNAPSHOTS_AT = 32, 60


@dataclass(frozen=True)
class Backups:
    """What a pool may ask of which hypervisors: its name, allow-list (host name to URI), longest chain, resolve()."""

    pool: str
    hypervisors: Mapping[str, str]
    max_incrementals: int
    resolve: Callable[[DiskSource], str | None]

    def uri(self, attachment: Attachment | None) -> str | None:
        """Return the URI of an attachment's hypervisor, or None when it is not allowed."""
        return None if attachment is None else self.hypervisors.get(attachment.hypervisor)

    def advice(self, attachment: Attachment | None) -> str:
        """Say what would let a hypervisor cut a volume in use."""
        if attachment is None:
            return "let its hypervisor cut it: say which VM has it attached (`frostgate vm snapshot` does)"
        return (
            f"let its hypervisor cut it: add {attachment.hypervisor!r} to `hypervisors` in the configuration of pool "
            f"{self.pool}"
        )

    def planned(
        self, root_fd: int, group: str, volume: str, source: int, image_format: str, attachment: Attachment
    ) -> layout.StoredBackup | None:
        """Return how a volume's hypervisor will cut it; None when the VM is off.

        Raises VolumeInUse when the attachment is not true, VmBusy, CapabilityMissing, PoolUnavailable.
        """
        uri = self.hypervisors[attachment.hypervisor]
        domain = hypervisors.find(uri, attachment.domain)
        if domain is None:
            raise VolumeInUse(
                f"volume {volume}: hypervisor {attachment.hypervisor} has no VM {attachment.domain}",
                volume=volume,
                domain=attachment.domain,
            )
        with hypervisors.errors(uri):
            if not domain.isActive():
                return None
            path, opened_as = hypervisors.checked_source(
                hypervisors.parsed(domain.XMLDesc(0)), attachment, volume, self.resolve
            )
            jobs.check_idle(domain, attachment.disk)
            if opened_as != image_format:
                raise CapabilityMissing(
                    f"volume {volume} is {image_format} here and {opened_as} to its VM: say its format", volume=volume
                )
            if image_format == "qcow2":
                _refuse_what_a_copy_would_lose(source, volume)
            job = jobs.shared(self.pool, group, uri, attachment.domain)
            planned = layout.StoredBackup(
                hypervisor=attachment.hypervisor,
                domain=attachment.domain,
                disk=attachment.disk,
                file=str(PurePosixPath(path).parent / layout.group_path(group) / volume),
                checkpoint=job.checkpoint if image_format == "qcow2" and checkpoints.can_track(domain) else "",
                job=job.checkpoint,
            )
            if planned.checkpoint:
                self._find_base(root_fd, domain, volume, source, planned)
        return planned

    def register(self, group: str, members: Sequence[layout.StoredMember], *, begun: bool = False) -> list[jobs.Job]:
        """Return the jobs of a group's members, each knowing this pool's disks.

        A hypervisor that is not allowed any more is left out.
        """
        found: dict[str, jobs.Job] = {}
        for member in members:
            planned = member.backup
            uri = planned and self.hypervisors.get(planned.hypervisor)
            if planned and uri:
                job = jobs.shared(self.pool, group, uri, planned.domain, planned.job)
                job.add([jobs.JobDisk(planned.disk, planned.file, bool(planned.checkpoint), planned.base)], begun=begun)
                found[planned.domain] = job
        return list(found.values())

    def cut(self, group: str, members: Sequence[layout.StoredMember]) -> None:
        """Fix the instant of every VM's disks; what could not be incremental after all is marked so.

        Raises VmBusy, VolumeChanged, PoolFull, PoolUnavailable.
        """
        for job in self.register(group, members):
            job.begin()
            if job.whole:
                for member in members:
                    if member.backup and member.backup.job == job.checkpoint:
                        member.backup.base = ""
                        member.backing = []

    def wait(self, group: str, members: Sequence[layout.StoredMember], progress: ReportProgress) -> None:
        """Return when every job has ended well. Raises CopyFailed, PoolFull, PoolUnavailable, Cancelled."""
        for job in self.register(group, members, begun=True):
            targets = [
                member.backup.disk for member in members if member.backup and member.backup.job == job.checkpoint
            ]
            job.watch(targets, progress)

    def supersede(self, group: str, members: Sequence[layout.StoredMember]) -> None:
        """Delete the checkpoints that nobody needs now that a group is settled; what fails the next one does again."""
        for job in self.register(group, members, begun=True):
            try:
                job.supersede()
            except PoolUnavailable as error:
                log.warning("older checkpoints stay", group=group, error=str(error))
        jobs.forget(self.pool, group)

    def cancel(self, root_fd: int, group: str) -> None:
        """End the jobs of a group that will not be finished. Raises PoolUnavailable: then one may still run."""
        noted = None
        with layout.group_directory(root_fd, group) as group_fd:
            try:
                noted = None if group_fd is None else layout.read(group_fd, layout.BACKUP, layout.Cut)
            except layout.Damaged as error:
                log.warning("which backup job to end is not known", group=group, error=str(error))
        if noted is not None:
            for job in self.register(group, noted.members, begun=True):
                job.cancel()
        jobs.forget(self.pool, group)

    def _find_base(self, root_fd: int, domain: Any, volume: str, source: int, planned: layout.StoredBackup) -> None:
        """Note the newest snapshot that this one can lie on, and how much changed since."""
        for name in checkpoints.ours(domain):
            member = _member_of(root_fd, name, volume)
            if member is None or not member.backup:
                continue
            if len(member.backing) >= self.max_incrementals:
                return
            if member.size_bytes != qcow2.header(source, volume).size_bytes:
                return
            changed = checkpoints.changed_bytes(domain, name, planned.disk)
            if changed is not None:
                planned.base, planned.changed_bytes = name, changed
            return


def make_target(root_fd: int, group_fd: int, target: int, member: layout.StoredMember) -> None:
    """Make the empty image that QEMU will fill, for the volume's owner only, and link in what it will lie on.

    Raises CapabilityMissing, PoolFull, PoolUnavailable, OSError.
    """
    planned = member.backup
    if planned is None:
        raise ValueError(f"{member.volume} is not cut by its hypervisor")
    words = ["create", "-q", "-f", "qcow2", qemu.path_of(target), str(member.size_bytes)]
    qemu.run("qemu-img", words, [target], timeout_s=_CREATE_TIMEOUT_S)
    try:
        os.fchown(target, member.attributes.uid, member.attributes.gid)
    except PermissionError:
        raise CapabilityMissing(
            f"the owner of volume {member.volume} cannot be given its copy, which QEMU has to write: this mount "
            "squashes root",
            volume=member.volume,
        ) from None
    # QEMU goes by path, as another user; what lies there stays closed to all but the owner
    os.fchmod(group_fd, 0o711)
    with directory(layout.SNAPSHOTS, root_fd) as snapshots_fd:
        os.fchmod(snapshots_fd, 0o711)
    if planned.base:
        base_group = checkpoints.group_of(planned.base) or ""
        try:
            with ExitStack() as opened:
                base_fd = opened.enter_context(layout.group_directory(root_fd, base_group))
                if base_fd is None:
                    raise CopyFailed(f"snapshot {base_group} is gone", group=base_group)
                below = layout.manifest(root_fd, base_group).member(member.volume)
                images = opened.enter_context(chains.member(base_fd, below))
                member.backing = chains.keep(group_fd, [chains.Backing("", image) for image in images], cloning=False)
        except ProviderError:  # deleted or damaged meanwhile
            planned.base, member.backing = "", []


def finish_target(target: int, member: layout.StoredMember) -> None:
    """Take the filled image back from QEMU's user. Raises CopyFailed, OSError."""
    os.fchown(target, os.geteuid(), os.getegid())
    header = qcow2.header(target, member.volume)
    if header.size_bytes != -(-member.size_bytes // _SECTOR) * _SECTOR or header.backing:
        raise CopyFailed(f"the copy of {member.volume} is not the image that was made for it", volume=member.volume)


def _member_of(root_fd: int, checkpoint: str, volume: str) -> layout.StoredMember | None:
    """Return the settled member that was made with a checkpoint."""
    try:
        member = layout.manifest(root_fd, checkpoints.group_of(checkpoint) or "").member(volume)
    except ProviderError:
        return None
    return member if member.backup and member.backup.checkpoint == checkpoint else None


def _refuse_what_a_copy_would_lose(source: int, volume: str) -> None:
    """Raise CapabilityMissing for a qcow2 volume of which a backup job copies less than it has."""
    head = os.pread(source, 72, 0)
    encryption, snapshots = (struct.unpack_from(">I", head, at)[0] for at in (_ENCRYPTION_AT, _SNAPSHOTS_AT))
    if encryption:
        raise CapabilityMissing(
            f"volume {volume} is encrypted, and its running VM's copy would be plain: stop the VM", volume=volume
        )
    if snapshots:
        raise CapabilityMissing(
            f"volume {volume} has {snapshots} internal snapshots, which its running VM's copy would lose: stop the VM, "
            "or delete them",
            volume=volume,
        )
