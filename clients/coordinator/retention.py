"""Which snapshots of a VM to keep: the newest so many, and the newest of each of so many days, weeks, months."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from frostgate.v1 import group_snapshot_pb2 as pb

_PERIODS = {"daily": "%Y-%m-%d", "weekly": "%G-%V", "monthly": "%Y-%m"}


@dataclass(frozen=True)
class Policy:
    """How many to keep of each kind; what any rule keeps is kept."""

    last: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0


def to_delete(snapshots: Sequence[pb.GroupSnapshot], policy: Policy) -> list[pb.GroupSnapshot]:
    """Return the READY snapshots that no rule keeps, oldest first; days, weeks and months are UTC's.

    Others than READY ones are neither counted nor returned.
    """
    ready = [snapshot for snapshot in snapshots if snapshot.state == pb.GROUP_SNAPSHOT_STATE_READY]
    ready.sort(key=lambda snapshot: snapshot.cut_time.ToNanoseconds(), reverse=True)
    kept = {snapshot.id for snapshot in ready[: policy.last]}
    for rule, pattern in _PERIODS.items():
        newest: dict[str, str] = {}
        for snapshot in ready:
            newest.setdefault(_cut(snapshot).strftime(pattern), snapshot.id)
        kept |= set(list(newest.values())[: getattr(policy, rule)])
    return [snapshot for snapshot in reversed(ready) if snapshot.id not in kept]


def _cut(snapshot: pb.GroupSnapshot) -> datetime:
    return snapshot.cut_time.ToDatetime(tzinfo=UTC)
