"""`frostgate pools` and `frostgate volumes`: what the gateway has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from clients.cli import tables
from clients.cli.session import USAGE, AddressOption, OutputOption, Refusal, command, print_json, printable, session
from frostgate.v1 import pool_pb2, volume_pb2
from frostgate.v1 import snapshot_provider_pb2 as rpc


@command
def pools(output: OutputOption = None, address: AddressOption = None) -> None:
    """List the pools: health, room, and what each can do."""
    with session.gateway() as gateway:
        found = gateway.call("ListPools", rpc.ListPoolsRequest()).pools
    if session.json:
        print_json(list(found))
        return
    tables.show(("POOL", "KIND", "HEALTH", "FREE", "TOTAL", "CAN"), (_pool_row(pool) for pool in found))
    for pool in found:
        if pool.health.message:
            print(f"{pool.name}: {printable(pool.health.message)}")


@command
def volumes(
    name: Annotated[str, typer.Argument(metavar="POOL[/VOLUME]", help="A pool, or one of its volumes.")],
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """List the volumes of a pool, or show one of them."""
    pool, _, volume = name.partition("/")
    with session.gateway() as gateway:
        if volume:
            request = rpc.GetVolumeRequest(ref=volume_pb2.VolumeRef(pool=pool, volume=volume))
            found: Iterator[volume_pb2.Volume] = iter([gateway.call("GetVolume", request).volume])
        else:
            found = _all_volumes(gateway, pool)
        if session.json:
            listed = list(found)
            print_json(listed[0] if volume else list(listed))
            return
        rows = (
            (
                tables.ref(found.ref),
                tables.size(found.size_bytes),
                tables.size(found.allocated_bytes),
                found.format,
                ", ".join(found.users) or ("yes" if found.in_use else ""),
            )
            for found in found
        )
        tables.show(("VOLUME", "SIZE", "ALLOCATED", "FORMAT", "IN USE BY"), rows)


def parse_ref(text: str) -> volume_pb2.VolumeRef:
    """Return a volume from "POOL/VOLUME". Raises Refusal."""
    pool, slash, volume = text.partition("/")
    if not (slash and pool and volume):
        raise Refusal(f"{text!r}: name a volume as POOL/VOLUME", USAGE)
    return volume_pb2.VolumeRef(pool=pool, volume=volume)


def _all_volumes(gateway: Any, pool: str) -> Iterator[volume_pb2.Volume]:
    request = rpc.ListVolumesRequest(pool=pool, page_size=500)
    while True:
        page = gateway.call("ListVolumes", request)
        yield from page.volumes
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def _pool_row(pool: pool_pb2.Pool) -> tuple[str, ...]:
    can = [name.name for name, value in pool.capabilities.ListFields() if isinstance(value, bool)]
    known = pool.HasField("space")
    return (
        pool.name,
        pool.kind,
        pool_pb2.PoolHealth.Status.Name(pool.health.status).removeprefix("STATUS_"),
        tables.size(pool.space.free_bytes) if known else "",
        tables.size(pool.space.total_bytes) if known else "",
        " ".join(can),
    )
