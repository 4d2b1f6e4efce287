"""Waiting for a group snapshot until the gateway has done what was asked."""

from __future__ import annotations

from typing import Annotated

import typer

from clients.cli import tables
from clients.cli.session import INTERRUPTED, REFUSED, Refusal
from clients.gateway import Gateway
from frostgate.v1 import group_snapshot_pb2 as pb

Wait = Annotated[bool, typer.Option(help="Wait until it is done.")]


def settled(gateway: Gateway, group_id: str, doing: str) -> pb.GroupSnapshot:
    """Wait until a group snapshot is READY and return it.

    Raises Refusal when it FAILED or is gone, or when Ctrl-C ends the waiting (the work goes on).
    """
    try:
        snapshot = tables.follow(gateway.watch(group_id), f"{doing} {group_id}")
    except KeyboardInterrupt:
        raise Refusal(
            f"interrupted: {doing} {group_id} goes on in the gateway. See `frostgate snapshot watch {group_id}`; "
            f"`frostgate snapshot delete {group_id}` gives it up",
            INTERRUPTED,
        ) from None
    if snapshot is None or snapshot.state == pb.GROUP_SNAPSHOT_STATE_DELETING:
        raise Refusal(f"group snapshot {group_id} was deleted", REFUSED)
    if snapshot.state == pb.GROUP_SNAPSHOT_STATE_FAILED:
        raise Refusal(
            f"group snapshot {group_id} FAILED: {snapshot.failure.message} ({snapshot.failure.reason}); delete it",
            REFUSED,
        )
    return snapshot
