"""What every storage refuses in the same words."""

from __future__ import annotations

from providers.base import GroupSpec, InvalidName, LimitExceeded, SnapshotExists


def check_count(spec: GroupSpec, at_most: int) -> None:
    """Raise LimitExceeded for more volumes than a pool's max_members."""
    if len(spec.volumes) > at_most:
        raise LimitExceeded(f"at most {at_most} volumes", limit="max_members", maximum=str(at_most))


def check_raw(spec: GroupSpec) -> None:
    """Raise InvalidName for a volume that the caller says has a format, where there are only raw ones."""
    for volume in spec.volumes:
        if volume.format not in (None, "raw"):
            raise InvalidName(f"volume {volume.name} is raw in this pool, not {volume.format}", volume=volume.name)


def not_in_journal(group: str) -> SnapshotExists:
    """Return the error for a finished snapshot that prepare() finds under the id that it should reserve."""
    return SnapshotExists(
        f"the storage has a snapshot {group} that this gateway's journal does not know: "
        "run `frostgate reconcile`, or choose another id",
        group=group,
    )
