"""The interface between the gateway and a storage: verbs, plain data, errors.

A provider knows one pool of one storage. It is plain synchronous Python and knows nothing of gRPC, the
journal or other pools: the gateway checks the input before, runs every verb on a bounded thread pool of
that storage with a deadline, and never runs two verbs for one group at the same time. Verbs for different
groups run concurrently, so a provider is thread-safe.

Every verb may be repeated after a crash at any line, its own or the gateway's, and then finishes what was
begun. What a verb raises is a ProviderError; it has then left nothing behind that was not there before,
except where it says otherwise.

What verbs raise is in errors.py, what they take and return in values.py; all of it is imported from here.

A provider is found by the entry point group ``frostgate.providers``; tests/conformance is this contract in
executable form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import ClassVar, Self

from pydantic import BaseModel

from providers.errors import (
    Cancelled,
    CapabilityMissing,
    CopyFailed,
    GroupBusy,
    InvalidName,
    LimitExceeded,
    PoolFull,
    PoolUnavailable,
    ProviderError,
    SnapshotDamaged,
    SnapshotExists,
    SnapshotInUse,
    SnapshotNotFound,
    VmBusy,
    VolumeChanged,
    VolumeExists,
    VolumeInUse,
    VolumeNotFound,
)
from providers.values import (
    Attachment,
    Capabilities,
    DiskSource,
    Extent,
    GroupSpec,
    Member,
    Space,
    StoredGroup,
    Volume,
    VolumeSpec,
)

__all__ = [
    "Attachment",
    "BlockReader",
    "Cancelled",
    "Capabilities",
    "CapabilityMissing",
    "CopyFailed",
    "DiskSource",
    "Extent",
    "GroupBusy",
    "GroupSpec",
    "InvalidName",
    "LimitExceeded",
    "Member",
    "PoolFull",
    "PoolUnavailable",
    "Provider",
    "ProviderError",
    "ReportProgress",
    "SnapshotDamaged",
    "SnapshotExists",
    "SnapshotInUse",
    "SnapshotNotFound",
    "Space",
    "StoredGroup",
    "VmBusy",
    "Volume",
    "VolumeChanged",
    "VolumeExists",
    "VolumeInUse",
    "VolumeNotFound",
    "VolumeSpec",
]

ReportProgress = Callable[[int, int], None]
"""Called with (done_bytes, total_bytes) as work goes on. Raises Cancelled when the work should stop: let it
pass, after removing what is half made."""


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
