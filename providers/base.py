"""The interface between the gateway and a storage: verbs, plain data, errors.

A provider knows one pool of one storage. It is plain synchronous Python and knows nothing of gRPC, the
journal or other pools: the gateway checks the input before, runs every verb on a bounded thread pool of
that storage with a deadline, and never runs two verbs for one group at the same time. Verbs for different
groups run concurrently, so a provider is thread-safe.

Every verb may be repeated after a crash at any line, its own or the gateway's, and then finishes what was
begun. What a verb raises is a ProviderError; it has then left nothing behind that was not there before,
except where it says otherwise.

A provider is found by the entry point group ``frostgate.providers``; tests/conformance is this contract in
executable form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import ClassVar, Self

from pydantic import BaseModel

ReportProgress = Callable[[int, int], None]
"""Called with (done_bytes, total_bytes) as work goes on. Raises Cancelled when the work should stop: let it
pass, after removing what is half made."""


class ProviderError(Exception):
    """What a storage can answer other than success.

    Each class carries the contract's stable `reason`; `metadata` has the offending names.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, **metadata: str) -> None:
        """Take a message that says what to do, and the offending names (volume=..., group=...)."""
        super().__init__(message)
        self.message = message
        self.metadata = metadata


class VolumeNotFound(ProviderError):
    """The pool has no such volume."""

    reason = "VOLUME_NOT_FOUND"


class VolumeInUse(ProviderError):
    """Somebody has the volume open, and the verb needs it closed. Name who in the message."""

    reason = "VOLUME_IN_USE"


class VolumeChanged(ProviderError):
    """The volume is not what prepare() saw any more: resized, replaced or written meanwhile."""

    reason = "VOLUME_CHANGED"


class VmBusy(ProviderError):
    """The hypervisor has another job for the VM (a backup, a migration), beside which it cannot cut."""

    reason = "VM_BUSY"


class CopyFailed(ProviderError):
    """What was cut could not be copied to its end: the VM stopped, or its hypervisor gave up. Nothing is left."""

    reason = "COPY_FAILED"


class PoolFull(ProviderError):
    """No room. Everything the verb had begun is removed."""

    reason = "POOL_FULL"


class PoolUnavailable(ProviderError):
    """The storage does not answer, or not as it should. Trying again later can help."""

    reason = "POOL_UNAVAILABLE"


class CapabilityMissing(ProviderError):
    """This storage cannot do that, now or for this volume."""

    reason = "CAPABILITY_MISSING"


class SnapshotNotFound(ProviderError):
    """The storage has no finished snapshot of that group and volume."""

    reason = "SNAPSHOT_DAMAGED"


class SnapshotDamaged(ProviderError):
    """What the storage has of a snapshot is not what it was: changed, or unreadable for good."""

    reason = "SNAPSHOT_DAMAGED"


class SnapshotExists(ProviderError):
    """The storage has a finished snapshot of that id, of which the journal does not know. It stays untouched."""

    reason = "GROUP_SNAPSHOT_EXISTS"


class SnapshotInUse(ProviderError):
    """A snapshot cannot be deleted because something on the storage needs it. Name what in the message."""

    reason = "SNAPSHOT_IN_USE"


class VolumeExists(ProviderError):
    """A volume to be made is there already, and is another."""

    reason = "VOLUME_EXISTS"


class InvalidName(ProviderError):
    """A name that this storage cannot have."""

    reason = "INVALID_ARGUMENT"


class LimitExceeded(ProviderError):
    """More volumes than max_members, or another limit of the storage."""

    reason = "LIMIT_EXCEEDED"


class GroupBusy(ProviderError):
    """Another gateway works on that group snapshot. Trying again later can help."""

    reason = "OPERATION_PENDING"


class Cancelled(ProviderError):
    """The work was given up because the group is being deleted or the gateway stops."""

    reason = "OPERATION_PENDING"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a pool can do; the fields are those of frostgate.v1.PoolCapabilities."""

    atomic_group: bool = False
    instant_cut: bool = False
    revert: bool = False
    instant_revert: bool = False
    online_revert: bool = False
    clone: bool = False
    read_blocks: bool = False
    allocated_extents: bool = False
    changed_extents: bool = False
    max_members: int = 128


@dataclass(frozen=True, slots=True)
class Space:
    """Room on the storage, in bytes."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Volume:
    """One virtual disk. `size_bytes` is what the guest sees; `users` says in words who writes to it."""

    name: str
    size_bytes: int
    allocated_bytes: int
    format: str
    in_use: bool = False
    users: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DiskSource:
    """Where a disk lies as libvirt says it; exactly one of the three is set.

    `rbd` is "pool/image" or "pool/namespace/image".
    """

    file: str | None = None
    rbd: str | None = None
    block_device: str | None = None
    monitors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Attachment:
    """The running VM that a caller says has a volume attached: to be checked, never believed.

    `hypervisor` is the host's name as libvirt gives it, `domain` the UUID, `disk` the target ("vda").
    """

    hypervisor: str
    domain: str
    disk: str


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """One volume to snapshot; `format` is None when the caller did not say."""

    name: str
    format: str | None = None
    attachment: Attachment | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """One volume's snapshot. `handle` is the storage's own name for it, empty before the cut.

    `mode` says in a word how it is cut ("clone", "backup", "copy"); `local_path` is its image file on this host, or "".
    `atomic` members of a group are cut by one operation of the storage.
    """

    volume: str
    size_bytes: int
    format: str
    mode: str
    handle: str = ""
    local_path: str = ""
    atomic: bool = False


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What prepare() is asked for: this pool's share of a group snapshot."""

    group: str
    volumes: tuple[VolumeSpec, ...]
    allow_copy: bool = False


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A group snapshot that the storage itself says exists.

    `record` is what describe() left with it (empty when it never came to that).
    """

    group: str
    cut_time: datetime | None
    members: tuple[Member, ...]
    record: bytes = b""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of bytes that is not a hole."""

    offset: int
    length: int


class BlockReader(ABC):
    """Random access to the bytes of one member, as the guest saw them. Used by one thread at a time."""

    size_bytes: int

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`; the range lies within size_bytes.

        Raises PoolUnavailable.
        """

    @abstractmethod
    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Yield what is not a hole in the range, ascending, clipped to the range, never overlapping.

        Raises PoolUnavailable.
        """

    @abstractmethod
    def close(self) -> None:
        """Free everything; may be called twice."""

    def __enter__(self) -> Self:
        """Enter: the reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Exit: close()."""
        self.close()


class Provider(ABC):
    """One pool of one storage. See the module's text for the rules that hold for every verb."""

    Options: ClassVar[type[BaseModel]]
    """The pool's keys in the configuration, besides `kind`; unknown keys are forbidden there."""

    @classmethod
    @abstractmethod
    def open_pool(cls, pool: str, options: BaseModel) -> Provider:
        """Return the provider of one pool, from validated Options.

        Does not fail because the storage is away: then the verbs raise PoolUnavailable, and work once it is back.
        """

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Say what this pool can do now. Raises PoolUnavailable."""

    @abstractmethod
    def space(self) -> Space:
        """Say how much room there is. Raises PoolUnavailable; serves as the health check."""

    @abstractmethod
    def volumes(self, after: str, limit: int) -> list[Volume]:
        """Return at most `limit` volumes whose names sort (by code point) after `after`, in that order.

        `after` is "" for the first page. Raises PoolUnavailable.
        """

    @abstractmethod
    def volume(self, name: str) -> Volume:
        """Return one volume. Raises VolumeNotFound, InvalidName, PoolUnavailable."""

    @abstractmethod
    def resolve(self, source: DiskSource) -> str | None:
        """Return the volume that a disk source names, or None when it does not lie in this pool.

        Never guesses: a path that only looks like the pool's is None. Raises PoolUnavailable.
        """

    @abstractmethod
    def prepare(self, spec: GroupSpec) -> list[Member]:
        """Check every volume and do all slow work before the guest is frozen.

        Repeatable: a second call for the same group gives the same. Returns one Member per volume in the same
        order, without handles. Nothing of it is visible in snapshots().
        Raises VolumeNotFound, VolumeInUse (cannot be cut while in use, and allow_copy was not given), VmBusy,
        PoolFull, CapabilityMissing, LimitExceeded, PoolUnavailable.
        """

    @abstractmethod
    def cut(self, group: str) -> list[Member]:
        """Fix the point in time of every volume that prepare() accepted, at one instant.

        Runs inside the freeze window: does only what prepare() could not, and neither syncs nor copies.
        Repeatable: a second call for a group that was cut returns the same members, with the same content.
        On an error no member is left. Raises VolumeChanged, VolumeNotFound, VolumeInUse, VmBusy, PoolFull,
        PoolUnavailable.
        """

    @abstractmethod
    def settle(self, group: str, cut_time: datetime, record: bytes, progress: ReportProgress) -> list[Member]:
        """Do everything after the cut, until the snapshot is durable and would survive a power cut.

        Blocks, for hours if it has to copy. Repeatable after a crash. `record` is kept with the snapshot as
        describe() would. Returns the members with handles and local paths.
        Raises PoolFull, VolumeChanged, CopyFailed, PoolUnavailable, Cancelled; the caller then calls abort().
        """

    @abstractmethod
    def describe(self, group: str, record: bytes) -> None:
        """Keep `record`, opaque and at most 4 MiB, with a settled snapshot, atomically replacing the one before.

        The journal can be rebuilt from it. Raises SnapshotNotFound, PoolFull, PoolUnavailable.
        """

    @abstractmethod
    def abort(self, group: str) -> None:
        """Undo prepare(), cut() and a settle() that has not finished. Nothing of the group is left.

        A group that is not known is fine. Raises PoolUnavailable.
        """

    def check_deletable(self, group: str) -> None:
        """Raise SnapshotInUse when a settled snapshot cannot be deleted now. Raises PoolUnavailable."""

    @abstractmethod
    def delete(self, group: str, progress: ReportProgress) -> None:
        """Remove a group's snapshots, or what is left of them; a group that is not known is fine.

        From its first step on the snapshot is not in snapshots() any more. Raises PoolUnavailable.
        """

    def prepare_revert(
        self, group: str, volumes: Sequence[str], progress: ReportProgress, *, instant: bool = False
    ) -> None:
        """Check that the volumes can be set back, and do all slow work for it, changing none of them.

        `instant` asks for a way whose time does not depend on the size, of a pool that says instant_revert.
        Repeatable. Raises VolumeInUse (naming who), SnapshotNotFound, PoolFull, CapabilityMissing, PoolUnavailable,
        Cancelled.
        """
        raise CapabilityMissing("this storage cannot revert", group=group)

    def revert(self, group: str, volumes: Sequence[str], progress: ReportProgress) -> None:
        """Set the volumes back to the snapshot. prepare_revert() went before.

        Repeatable after a crash until it succeeds: the gateway rolls forward, never back, from here.
        Owner, mode and attributes of the volumes are kept. Raises VolumeInUse, PoolUnavailable.
        """
        raise CapabilityMissing("this storage cannot revert", group=group)

    def abort_revert(self, group: str) -> None:
        """Undo prepare_revert(); fine when there is nothing to undo. Raises PoolUnavailable."""

    def clone(self, group: str, volume: str, target: str, progress: ReportProgress) -> Volume:
        """Make a new volume from a member, whole or not at all.

        Repeatable: a volume that this clone has made is returned. Raises VolumeExists, InvalidName, SnapshotNotFound,
        PoolFull, PoolUnavailable, Cancelled, CapabilityMissing unless the storage can.
        """
        raise CapabilityMissing("this storage cannot clone a snapshot to a new volume", volume=volume)

    def open(self, group: str, volume: str) -> BlockReader:
        """Return a reader of one member of a settled snapshot.

        Raises SnapshotNotFound, CapabilityMissing, PoolUnavailable.
        """
        raise CapabilityMissing("this storage cannot read snapshots", volume=volume)

    def changed_extents(self, group: str, volume: str, base: str | None, *, coarse: bool = False) -> Iterator[Extent]:
        """Yield what differs between two snapshots of a volume (from nothing without a base), ascending.

        Every byte that differs lies in an extent; extents may have bytes that do not differ, and more of them when
        `coarse` allows the storage's own granularity. Raises SnapshotNotFound, PoolUnavailable, CapabilityMissing
        unless it can.
        """
        raise CapabilityMissing("this storage cannot compare snapshots", volume=volume)

    @abstractmethod
    def snapshots(self) -> Iterator[StoredGroup]:
        """Yield every settled group snapshot that the storage has: the truth the journal is rebuilt from.

        Raises PoolUnavailable.
        """

    def leftovers(self) -> Iterator[str]:
        """Yield the ids of groups that were begun or half deleted: neither snapshots() nor nothing.

        Those that the journal does not know either are abort()ed and delete()d by reconcile. Raises PoolUnavailable.
        """
        yield from ()

    def close(self) -> None:
        """Free connections and threads; no verb is called afterwards."""
