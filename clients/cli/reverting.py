"""Reverts, as `frostgate snapshot` and `frostgate vm` ask for them: what they share."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Annotated

import typer

from clients.cli.pools import parse_ref
from clients.cli.session import REFUSED, Refusal, confirm, session
from clients.gateway import Gateway
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc

SafetyId = Annotated[
    str, typer.Option(help="Id under which the present state is kept; a repeat with it is the same revert.")
]
NoSafety = Annotated[bool, typer.Option("--no-safety", help="Do not keep the present state.")]
Instant = Annotated[
    bool,
    typer.Option(
        "--instant",
        help="In a time that does not depend on the size, where the pool can; see its limits in the README.",
    ),
]


def confirm_revert(question: str, *, no_safety: bool, yes: bool) -> None:
    """Ask, and say what becomes of the present state. Raises Refusal."""
    kept = "Their present state is LOST." if no_safety else "Their present state is kept."
    confirm(f"{question} {kept}", yes=yes)


def begin_revert(
    gateway: Gateway, group_id: str, volumes: list[str], safety_id: str, *, no_safety: bool, instant: bool
) -> pb.GroupSnapshot:
    """Begin a revert; the present state is kept under `safety_id`, or under a new id when that is "".

    Raises GatewayError, Refusal.
    """
    request = rpc.RevertGroupSnapshotRequest(
        id=group_id,
        volumes=[parse_ref(volume) for volume in volumes],
        safety_id="" if no_safety else safety_id or _new_safety_id(group_id),
        no_safety=no_safety,
        instant=instant,
    )
    started: pb.GroupSnapshot = gateway.call("RevertGroupSnapshot", request).group_snapshot
    return started


def check_reverted(snapshot: pb.GroupSnapshot) -> None:
    """Say where the state before is. Raises Refusal when the revert FAILED."""
    last = snapshot.revert
    if last.state == pb.Revert.STATE_FAILED:
        raise Refusal(f"nothing was reverted: {last.failure.message} ({last.failure.reason})", REFUSED)
    if last.safety_id and not session.json:
        print(f"the state before is kept as {last.safety_id}")


def _new_safety_id(group_id: str) -> str:
    return f"{group_id[:80]}-before-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
