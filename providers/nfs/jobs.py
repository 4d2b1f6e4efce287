"""libvirt's push-mode backup job: one a group snapshot and VM, shared by every pool that has disks of that VM.

Begun, it is one instant over all its disks, and copies them while the guest goes on. That it ended well is
believed only of libvirt's own event, seen on a connection on which the job was seen as ours; a job that ended while
nobody looked has failed. Source: libvirt virDomainBackupBegin, formatbackup, formatcheckpoint.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog
from lxml import etree

from providers.base import CopyFailed, PoolFull, PoolUnavailable, ProviderError, ReportProgress, VmBusy, VolumeChanged
from providers.nfs import checkpoints, hypervisors

log = structlog.get_logger()

_GENTLE_BYTES_PER_S = 16 * 1024 * 1024
_GENTLE_S = 1.0
_POLL_S = 0.5
_EVENT_GRACE_S = 5.0
_ABORT_S = 20.0
_FULL = ("No space left on device", "Disk quota exceeded")


@dataclass(frozen=True, slots=True)
class JobDisk:
    """One disk of a job. `file` is the image to be filled, as the hypervisor sees it.

    With a `base` only what changed since that checkpoint is copied. `tracked` disks are part of the new checkpoint.
    """

    target: str
    file: str
    tracked: bool = False
    base: str = ""


class Job:
    """The job of one group and VM. Thread-safe: each pool's threads call it for that pool's disks."""

    def __init__(self, uri: str, domain: str, checkpoint: str) -> None:
        """Take the hypervisor's URI, the domain's UUID and the name of the checkpoint that is made with it."""
        self.uri = uri
        self.checkpoint = checkpoint
        self.pools: set[str] = set()
        self.whole = False
        """Set when the bitmaps that a base needs were lost: everything was copied."""
        self._uuid = domain
        self._disks: dict[str, JobDisk] = {}
        self._lock = threading.Lock()
        self._begun = False
        self._refused: ProviderError | None = None
        self._watched: tuple[Any, int] | None = None
        self._ours = False
        self._ended = threading.Event()
        self._outcome: dict[str, Any] | None = None

    def add(self, disks: Sequence[JobDisk], *, begun: bool = False) -> None:
        """Add a pool's disks; `begun` when the job was begun before this process started."""
        with self._lock:
            self._disks |= {disk.target: disk for disk in disks}
            self._begun = self._begun or begun

    def begin(self) -> None:
        """Fix the instant of all disks. The first caller does it, the others get what became of it. Repeatable.

        Raises VmBusy, VolumeChanged (the VM is gone), PoolFull, PoolUnavailable.
        """
        with self._lock:
            if self._refused:
                raise self._refused
            if self._begun:
                return
            try:
                self._begin()
            except ProviderError as error:
                self._refused = error
                self._look_away()
                raise
            self._begun = True
        threading.Thread(target=self._ease, name="backup-ease", daemon=True).start()

    def watch(self, targets: Sequence[str], progress: ReportProgress) -> None:
        """Return when the job has ended well; report what it has done of some of its disks.

        Raises CopyFailed, PoolFull, PoolUnavailable (call it again), and what progress() raises.
        """
        done = dict.fromkeys(targets, (0, 0))
        while not self._ended.is_set():
            domain = self._attended()
            if self._is_running(domain):
                self._report(domain, done, progress)
                self._ended.wait(_POLL_S)
            elif not self._ended.wait(_EVENT_GRACE_S):
                raise CopyFailed("the backup job ended while nobody watched it: its copy cannot be relied on")
        outcome = self._outcome or {}
        if not outcome.get("success"):
            said = str(outcome.get("errmsg") or "it was aborted, or the VM stopped")
            if any(sign in said for sign in _FULL):
                raise PoolFull(f"the hypervisor's backup job: {said}; make room")
            raise CopyFailed(f"the hypervisor's backup job did not finish: {said}")

    def cancel(self) -> None:
        """Abort the job if it runs, and forget its checkpoint; what it filled is worth nothing. Repeatable.

        Raises PoolUnavailable: then it may still run.
        """
        domain = hypervisors.find(self.uri, self._uuid)
        if domain is None:
            return
        with hypervisors.errors(self.uri):
            deadline = time.monotonic() + _ABORT_S
            while self._is_running(domain):
                if time.monotonic() > deadline:
                    raise PoolUnavailable(f"libvirt at {self.uri} does not end the backup job of {self._uuid}")
                with suppress(hypervisors.load().libvirtError):  # it may have ended by itself
                    domain.abortJob()
                self._ended.wait(0.1)
            checkpoints.remove(domain, self.checkpoint)
        self._look_away()

    def supersede(self) -> None:
        """Delete the checkpoints of ours that nobody needs beside this job's. Raises PoolUnavailable."""
        domain = hypervisors.find(self.uri, self._uuid)
        if domain is not None:
            tracked = {disk.target for disk in self._disks.values() if disk.tracked}
            with hypervisors.errors(self.uri):
                checkpoints.remove_older(domain, self.checkpoint, tracked)
        self._look_away()

    def _begin(self) -> None:
        libvirt = hypervisors.load()
        domain = hypervisors.find(self.uri, self._uuid)
        if domain is None:
            raise VolumeChanged(f"the VM {self._uuid} is not on its hypervisor any more", domain=self._uuid)
        with hypervisors.errors(self.uri):
            check_idle(domain, *self._disks)
            self._listen(domain, ours=True)
            try:
                self._submit(domain)
            except libvirt.libvirtError as error:
                if error.get_error_code() not in checkpoints.lost_codes():
                    raise self._refusal(error) from None
                log.warning("dirty bitmaps are lost, everything is copied", domain=self._uuid, error=str(error))
                self.whole = True
                try:
                    self._submit(domain)
                except libvirt.libvirtError as again:
                    raise self._refusal(again) from None

    def _submit(self, domain: Any) -> None:
        disks = list(self._disks.values())
        tracked = [disk.target for disk in disks if disk.tracked]
        checkpoint = checkpoints.description(self.checkpoint, tracked) if tracked else None
        reuse = hypervisors.load().VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL
        domain.backupBegin(_description(disks, whole=self.whole), checkpoint, reuse)

    def _refusal(self, error: Any) -> ProviderError:
        libvirt = hypervisors.load()
        names = {"domain": self._uuid}
        if error.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT:
            return VmBusy(f"the VM {self._uuid} has another job: {error}; try again when it is done", **names)
        if "not running" in str(error):
            return VolumeChanged(f"the VM {self._uuid} was stopped since it was prepared", **names)
        if any(sign in str(error) for sign in _FULL):
            return PoolFull(f"the hypervisor could not begin the backup: {error}; make room")
        return PoolUnavailable(f"libvirt at {self.uri} could not begin the backup: {error}", **names)

    def _ease(self) -> None:
        """Copy slowly at first: at full speed the guest's agent waits, and with it the thaw."""
        try:
            self._set_speed(_GENTLE_BYTES_PER_S)
            self._ended.wait(_GENTLE_S)
            self._set_speed(0)
        except PoolUnavailable as error:  # watch() sees it as well
            log.warning("the backup's speed cannot be set", domain=self._uuid, error=str(error))

    def _set_speed(self, bytes_per_s: int) -> None:
        libvirt = hypervisors.load()
        domain = hypervisors.find(self.uri, self._uuid)
        for disk in self._disks if domain else ():
            with suppress(libvirt.libvirtError):  # that disk is copied already
                domain.blockJobSetSpeed(disk, bytes_per_s, libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES)

    def _attended(self) -> Any:
        """Return the domain, its job's end being listened for on a connection that lives. Raises PoolUnavailable."""
        domain = hypervisors.find(self.uri, self._uuid)
        if domain is None:
            raise CopyFailed(f"the VM {self._uuid} is not on its hypervisor any more", domain=self._uuid)
        with self._lock:
            if self._watched is None or self._watched[0] is not hypervisors.connect(self.uri):
                with hypervisors.errors(self.uri):
                    self._listen(domain, ours=False)
                    self._ours = self._is_running(domain)
                self._set_speed(0)  # who began it may have died while it was slow
        return domain

    def _listen(self, domain: Any, *, ours: bool) -> None:
        self._look_away()
        libvirt = hypervisors.load()
        connection = hypervisors.connect(self.uri)
        self._ours = ours
        callback: Callable[..., None] = self._completed
        event = libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED
        self._watched = connection, connection.domainEventRegisterAny(domain, event, callback, None)

    def _look_away(self) -> None:
        if self._watched:
            connection, number = self._watched
            self._watched = None
            with suppress(hypervisors.load().libvirtError):  # of a connection that is closed
                connection.domainEventDeregisterAny(number)

    def _completed(self, _connection: Any, _domain: Any, stats: dict[str, Any], _data: Any) -> None:
        """Hear of a job's end; libvirt's event thread calls it."""
        if self._ours and stats.get("operation") == hypervisors.load().VIR_DOMAIN_JOB_OPERATION_BACKUP:
            self._outcome = dict(stats)
            self._ended.set()

    def _is_running(self, domain: Any) -> bool:
        """Tell whether the domain's backup job is this one: it fills our files. Raises PoolUnavailable."""
        libvirt = hypervisors.load()
        try:
            text = domain.backupGetXMLDesc(0)
        except libvirt.libvirtError as error:
            gone = (libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN)
            if error.get_error_code() in gone:
                return False
            raise hypervisors.unavailable(self.uri, error) from None
        files = {target.get("file") for target in hypervisors.parsed(text).iterfind("./disks/disk/target")}
        return any(disk.file in files for disk in self._disks.values())

    def _report(self, domain: Any, done: dict[str, tuple[int, int]], progress: ReportProgress) -> None:
        libvirt = hypervisors.load()
        for target, (_, total) in done.items():
            try:
                info = domain.blockJobInfo(target, 0)
            except libvirt.libvirtError as error:
                raise hypervisors.unavailable(self.uri, error) from None
            done[target] = (info["cur"], info["end"]) if info else (total, total)
        progress(sum(part for part, _ in done.values()), sum(total for _, total in done.values()))


def check_idle(domain: Any, *disks: str) -> None:
    """Raise VmBusy when the VM, or one of these disks, has a job beside which no backup can begin."""
    libvirt = hypervisors.load()
    name, uuid = domain.name(), domain.UUIDString()
    running = domain.jobStats()
    if running.get("type", libvirt.VIR_DOMAIN_JOB_NONE) != libvirt.VIR_DOMAIN_JOB_NONE:
        raise VmBusy(f"the VM {name} has another job (`virsh domjobinfo`); try again later", domain=uuid)
    for disk in disks:
        if domain.blockJobInfo(disk, 0):
            raise VmBusy(
                f"disk {disk} of the VM {name} has another job (`virsh blockjob`); try again later",
                domain=uuid,
                disk=disk,
            )


def new_checkpoint(group: str) -> str:
    """Return a name for the checkpoint of a group, which no other has."""
    return f"{checkpoints.PREFIX}{group}.{secrets.token_hex(4)}"


_registered: dict[tuple[str, str, str], Job] = {}
_registry_lock = threading.Lock()


def shared(pool: str, group: str, uri: str, domain: str, checkpoint: str = "") -> Job:
    """Return the process's job of a group and VM, made when there is none (under the given checkpoint's name)."""
    with _registry_lock:
        key = group, uri, domain
        if key not in _registered:
            _registered[key] = Job(uri, domain, checkpoint or new_checkpoint(group))
        _registered[key].pools.add(pool)
        return _registered[key]


def forget(pool: str, group: str) -> None:
    """Forget the jobs of a group, once the last of their pools says so; what they do goes on."""
    with _registry_lock:
        for key, job in list(_registered.items()):
            if key[0] == group:
                job.pools.discard(pool)
                if not job.pools:
                    del _registered[key]


def _description(disks: Sequence[JobDisk], *, whole: bool) -> str:
    root = etree.Element("domainbackup", mode="push")
    listed = etree.SubElement(root, "disks")
    for disk in disks:
        element = etree.SubElement(listed, "disk", name=disk.target, backup="yes", type="file", backupmode="full")
        if disk.base and not whole:
            element.set("backupmode", "incremental")
            element.set("incremental", disk.base)
        etree.SubElement(element, "driver", type="qcow2")
        etree.SubElement(element, "target", file=disk.file)
    return etree.tostring(root, encoding="unicode")
