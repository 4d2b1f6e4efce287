"""Taking a VM snapshot: resolve the disks, prepare, arm the guard, freeze, cut, check, thaw, confirm.

Whatever goes wrong, the guest is thawed first and the group snapshot deleted then: all of it or nothing.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from clients.coordinator import domains, quiet
from clients.coordinator.errors import CoordinatorError, DiskUnknown, NotQuiet, StateRefused
from clients.coordinator.guard import Guard
from clients.coordinator.quiet import Quiesce, Way, Window
from clients.gateway import Gateway, GatewayError
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc

_CONFIRM_WITHIN_S = 30
_EXPIRE_S = 120


@dataclass(frozen=True)
class Wish:
    """What to take. `group_id` "" chooses one; `max_freeze_s` is when the guard thaws, whatever happens."""

    group_id: str = ""
    quiesce: Quiesce = Quiesce.REQUIRED
    max_freeze_s: float = 5.0
    exclude: Sequence[str] = ()
    labels: dict[str, str] = field(default_factory=dict)
    allow_copy: bool = False


@dataclass(frozen=True)
class Taken:
    """A VM snapshot that was cut and confirmed; `skipped` are disks that are no part of it, with the reason."""

    snapshot: pb.GroupSnapshot
    window: Window
    skipped: list[domains.Disk]


def take(gateway: Gateway, uri: str, name: str, wish: Wish, say: Callable[[str], None]) -> Taken:
    """Take a snapshot of a VM; returns once it is cut, verified and confirmed (watch it until it is READY).

    Args: uri   libvirt's
          name  the domain's name or UUID
          say   hears in words what is being done
    Raises CoordinatorError, GatewayError; then the guest runs (or StillFrozen tells otherwise) and nothing is
    left of the snapshot, except where the message says so.
    """
    connection = domains.connect(uri)
    domain = domains.find(connection, name)
    found = domains.disks(domain)
    specs, skipped = _volumes(gateway, found, wish.exclude, domains.attachment(domain))
    if not specs:
        raise StateRefused(f"VM {domain.name()} has no disk to snapshot")
    way = quiet.choose(domain, wish.quiesce)
    group_id = wish.group_id or new_id(domain.name())
    spec = pb.GroupSnapshotSpec(
        volumes=specs,
        labels=wish.labels,
        vm=pb.VmRecord(uuid=domain.UUIDString(), name=domain.name(), domain_xml=domain.XMLDesc(0)),
        allow_copy=wish.allow_copy,
    )
    _, reason = domains.state(domain)
    windows = way is Way.FREEZE and domains.is_windows(domain)
    _refuse_existing(gateway, group_id)
    guard = Guard(uri, domain.UUIDString(), wish.max_freeze_s) if way in (Way.FREEZE, Way.PAUSE) else None
    try:
        with _termination():
            say("preparing")
            prepared = _prepare(gateway, group_id, spec)
            try:
                if way is Way.NOTHING:
                    _check_atomic(prepared)
                opened = _cut(gateway, group_id, domain, way, guard, wish.max_freeze_s, say)
                confirmed = _confirm(gateway, group_id, quiet.worth(way, reason, windows=windows))
            except BaseException:
                _undo(gateway, group_id, say)
                raise
    finally:
        if guard:
            guard.leave()
    return Taken(confirmed, opened, skipped)


def new_id(name: str) -> str:
    """Return a new group id for a VM's snapshot, from its name and the time."""
    safe = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]", "-", name)).lstrip("._-")[:80] or "vm"
    return f"{safe}-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"[:-3] + "Z"


def _volumes(
    gateway: Gateway, found: Sequence[domains.Disk], exclude: Sequence[str], attachment: pb.VolumeAttachment | None
) -> tuple[list[pb.VolumeSpec], list[domains.Disk]]:
    """Return what to snapshot, and the disks that are left out. Raises DiskUnknown, GatewayError.

    `attachment` is the running VM's, without a disk; None when the VM is off.
    """
    unknown = sorted(set(exclude) - {disk.target for disk in found})
    if unknown:
        targets = ", ".join(disk.target for disk in found)
        raise DiskUnknown(f"--exclude: the VM has no disk {', '.join(unknown)}; it has {targets}")
    wanted = [disk for disk in found if not disk.skipped and disk.target not in exclude]
    skipped = [disk for disk in found if disk.skipped]
    skipped += [_excluded(disk) for disk in found if not disk.skipped and disk.target in exclude]
    if not wanted:
        return [], skipped
    strange = [disk for disk in wanted if disk.source.WhichOneof("source") is None]
    known = [disk for disk in wanted if disk not in strange]
    problems = [f"disk {disk.target} ({disk.location}) is of a kind that no pool can have" for disk in strange]
    specs = []
    if known:
        request = rpc.ResolveVolumesRequest(sources=[disk.source for disk in known])
        for disk, resolution in zip(known, gateway.call("ResolveVolumes", request).resolutions, strict=True):
            if not resolution.HasField("volume"):
                problems.append(f"disk {disk.target} ({disk.location}) {resolution.unresolved_reason}")
                continue
            image_format = disk.format if disk.format in ("raw", "qcow2") else ""
            specs.append(pb.VolumeSpec(ref=resolution.volume, format=image_format))
            if attachment:
                specs[-1].attachment.CopyFrom(attachment)
                specs[-1].attachment.disk = disk.target
    if problems:
        raise DiskUnknown("; ".join(problems) + ". Configure a pool for it, or leave it out with --exclude")
    return specs, skipped


def _excluded(disk: domains.Disk) -> domains.Disk:
    return domains.Disk(disk.target, disk.source, disk.location, disk.format, "is excluded")


def _check_atomic(prepared: pb.GroupSnapshot) -> None:
    """Raise NotQuiet when several disks of a running VM would not share an instant."""
    members = prepared.members
    if len(members) > 1 and (len({m.volume.pool for m in members}) > 1 or not all(m.atomic for m in members)):
        raise NotQuiet(
            "with --quiesce none the disks of a running VM would not share an instant: their storage cannot cut "
            "them at once. Say --quiesce preferred, or snapshot one disk with --exclude for the others"
        )


def _refuse_existing(gateway: Gateway, group_id: str) -> None:
    """Raise StateRefused when the id is taken: what is undone on a failure must be ours."""
    try:
        gateway.get(group_id)
    except GatewayError as error:
        if error.reason != "GROUP_SNAPSHOT_NOT_FOUND":
            raise
        return
    raise StateRefused(f"group snapshot {group_id} exists; choose another --id")


def _prepare(gateway: Gateway, group_id: str, spec: pb.GroupSnapshotSpec) -> pb.GroupSnapshot:
    request = rpc.PrepareGroupSnapshotRequest(id=group_id, spec=spec)
    request.expire_after.FromTimedelta(timedelta(seconds=_EXPIRE_S))
    try:
        prepared: pb.GroupSnapshot = gateway.call("PrepareGroupSnapshot", request).group_snapshot
    except KeyboardInterrupt:
        _undo(gateway, group_id, lambda _text: None)
        raise
    return prepared


def _cut(
    gateway: Gateway,
    group_id: str,
    domain: Any,
    way: Way,
    guard: Guard | None,
    max_freeze_s: float,
    say: Callable[[str], None],
) -> Window:
    """Freeze, cut, check, thaw. Raises NotQuiet, StillFrozen, GatewayError."""
    request = rpc.CreateGroupSnapshotRequest(id=group_id)
    request.confirm_within.FromTimedelta(timedelta(seconds=_CONFIRM_WITHIN_S))
    if guard:
        guard.wait_armed()
    say("cutting")
    try:
        with quiet.window(domain, way, guard, max_freeze_s) as opened:
            gateway.call("CreateGroupSnapshot", request, timeout_s=max_freeze_s if guard else 60)
    except GatewayError as error:
        if error.reason == "DEADLINE_EXCEEDED":
            raise NotQuiet(
                f"the cut was not done within --max-freeze, {max_freeze_s:g} s; no snapshot was kept"
            ) from None
        raise
    if not opened.verified:
        raise NotQuiet(f"{opened.doubt}; no snapshot was kept")
    return opened


def _confirm(gateway: Gateway, group_id: str, consistency: pb.Consistency.ValueType) -> pb.GroupSnapshot:
    request = rpc.ConfirmGroupSnapshotRequest(id=group_id, consistency=consistency)
    confirmed: pb.GroupSnapshot = gateway.call("ConfirmGroupSnapshot", request).group_snapshot
    return confirmed


def _undo(gateway: Gateway, group_id: str, say: Callable[[str], None]) -> None:
    """Delete what was begun. When the gateway cannot be reached it does so by itself, unconfirmed as it is."""
    say("undoing")
    with suppress(GatewayError, CoordinatorError):
        gateway.delete(group_id)


@contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM end us as Ctrl-C does, so that everything is undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
