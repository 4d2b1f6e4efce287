"""The life of a group snapshot: one table of allowed transitions, and every change goes through it."""

from __future__ import annotations

from typing import TypeAlias

from frostgate.v1 import group_snapshot_pb2 as pb
from gateway.errors import Refused

State: TypeAlias = pb.GroupSnapshotState.ValueType

PREPARED = pb.GROUP_SNAPSHOT_STATE_PREPARED
COPYING = pb.GROUP_SNAPSHOT_STATE_COPYING
READY = pb.GROUP_SNAPSHOT_STATE_READY
REVERTING = pb.GROUP_SNAPSHOT_STATE_REVERTING
DELETING = pb.GROUP_SNAPSHOT_STATE_DELETING
FAILED = pb.GROUP_SNAPSHOT_STATE_FAILED

TRANSITIONS: dict[State, frozenset[State]] = {
    PREPARED: frozenset({COPYING, DELETING}),
    COPYING: frozenset({READY, FAILED, DELETING}),
    READY: frozenset({REVERTING, DELETING}),
    REVERTING: frozenset({READY}),
    FAILED: frozenset({DELETING}),
    DELETING: frozenset(),
}

SETTLED = frozenset({READY, FAILED})
"""Where a watch ends."""

READABLE = frozenset({READY, REVERTING})
"""Where members can be read."""


def name(state: State) -> str:
    """Return the state's short name: "READY"."""
    return pb.GroupSnapshotState.Name(state).removeprefix("GROUP_SNAPSHOT_STATE_")


def unreadable(group_id: str, state: State) -> Refused:
    """Return the error for who reads a group snapshot in a state that is not READABLE."""
    return Refused(
        "STATE_INVALID",
        f"group snapshot {group_id} is {name(state)}; only a READY one can be read",
        group_snapshot=group_id,
        state=name(state),
    )


def move(snapshot: pb.GroupSnapshot, target: State) -> None:
    """Put a group snapshot into another state, or raise Refused STATE_INVALID when the table has no such step."""
    if target not in TRANSITIONS[snapshot.state]:
        raise Refused(
            "STATE_INVALID",
            f"group snapshot {snapshot.id} is {name(snapshot.state)} and cannot become {name(target)}",
            group_snapshot=snapshot.id,
            state=name(snapshot.state),
        )
    snapshot.state = target
