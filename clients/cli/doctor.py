"""`frostgate doctor`: what is wrong, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from clients.cli import tables
from clients.cli.session import FAILED, AddressOption, OutputOption, command, print_json, session
from clients.gateway import Gateway, GatewayError, from_rpc_error
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import pool_pb2
from frostgate.v1 import snapshot_provider_pb2 as rpc

DEFAULT_CONNECT = "qemu:///system"
_LOW_PERCENT = 5
_LONG = timedelta(hours=1)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    verdict: Literal["ok", "warning", "problem"]
    subject: str
    message: str


@command
def doctor(
    connect: Annotated[
        str | None, typer.Option("--connect", "-c", help="libvirt URI. [default: qemu:///system]")
    ] = None,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Look at gateway, pools, snapshots and guests; say what is wrong and what to do. Ends with 1 on a problem."""
    findings = [*_gateway(), *_guests(connect or os.environ.get("LIBVIRT_DEFAULT_URI", DEFAULT_CONNECT))]
    if session.json:
        print_json([asdict(finding) for finding in findings])
    else:
        tables.show(("", "WHAT", ""), ((found.verdict, found.subject, found.message) for found in findings))
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(FAILED)


def _gateway() -> Iterator[Finding]:
    try:
        with session.gateway() as gateway:
            yield _health(gateway)
            for pool in gateway.call("ListPools", rpc.ListPoolsRequest()).pools:
                yield _pool(pool)
            yield from _snapshots(gateway)
    except GatewayError as error:
        yield Finding("problem", "gateway", str(error))


def _health(gateway: Gateway) -> Finding:
    request = health_pb2.HealthCheckRequest(service="frostgate.v1.SnapshotProvider")
    try:
        check = health_pb2_grpc.HealthStub(gateway.channel).Check  # type: ignore[attr-defined]
        status = check(request, timeout=10).status
    except grpc.RpcError as error:
        raise from_rpc_error(error, gateway.endpoint) from None
    if status == health_pb2.HealthCheckResponse.SERVING:
        return Finding("ok", "gateway", f"serves at {gateway.endpoint.address}")
    return Finding("problem", "gateway", "does not serve now: it is starting or stopping")


def _pool(pool: pool_pb2.Pool) -> Finding:
    subject = f"pool {pool.name}"
    if pool.health.status != pool_pb2.PoolHealth.STATUS_HEALTHY:
        return Finding("problem", subject, pool.health.message)
    free = 100 * pool.space.free_bytes // max(pool.space.total_bytes, 1)
    if free < _LOW_PERCENT:
        return Finding("warning", subject, f"{free} % free: make room, snapshots may fail with POOL_FULL")
    if not pool.capabilities.instant_cut:
        return Finding(
            "warning", subject, f"{free} % free; cannot clone files: volumes in use are refused without --allow-copy"
        )
    return Finding("ok", subject, f"{free} % free, instant cuts")


def _snapshots(gateway: Gateway) -> Iterator[Finding]:
    count = 0
    for snapshot in gateway.list():
        count += 1
        subject = f"snapshot {snapshot.id}"
        age = datetime.now(UTC) - snapshot.create_time.ToDatetime(tzinfo=UTC)
        if snapshot.state == pb.GROUP_SNAPSHOT_STATE_FAILED:
            advice = f"`frostgate snapshot delete {snapshot.id}`"
            yield Finding("warning", subject, f"FAILED: {snapshot.failure.message}; {advice}")
        elif snapshot.state != pb.GROUP_SNAPSHOT_STATE_READY and age > _LONG:
            yield Finding("warning", subject, f"{tables.state(snapshot)} since {tables.time(snapshot.create_time)}")
    yield Finding("ok", "snapshots", f"{count} in all")


def _guests(uri: str) -> Iterator[Finding]:
    try:
        from clients.coordinator import domains, errors
    except ImportError:
        yield Finding("warning", "libvirt", "python3-libvirt is not installed: guests are not looked at")
        return
    try:
        connection = domains.connect(uri)
    except errors.HypervisorUnavailable as error:
        yield Finding("warning", "libvirt", str(error))
        return
    count = 0
    for name, state in domains.freeze_states(connection):
        count += 1
        if state == "frozen":
            yield Finding("problem", f"guest {name}", f"is FROZEN: `frostgate vm thaw {name}`, unless a snapshot runs")
        elif state != "thawed":
            yield Finding("warning", f"guest {name}", state)
    yield Finding("ok", "guests", f"{count} running at {uri}")
