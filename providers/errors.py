"""What a verb can raise: each class carries the contract's reason. Import them from providers.base."""

from __future__ import annotations

from typing import ClassVar


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
