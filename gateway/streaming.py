"""Reading members: blocks and extents as bounded streams, the next part read while the last one is sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from functools import cache
from itertools import islice

from google.protobuf.timestamp_pb2 import Timestamp

from frostgate.v1 import snapshot_provider_pb2 as rpc
from frostgate.v1 import volume_pb2
from gateway import states, taking
from gateway.errors import BadInput, Refused
from gateway.groups import Core
from gateway.journal import Group
from gateway.pools import Pool
from providers.base import BlockReader, Extent

CHUNK_BYTES = 1024 * 1024
EXTENTS_A_MESSAGE = 1000


async def read_blocks(
    core: Core, group: Group, request: rpc.ReadBlocksRequest
) -> AsyncIterator[rpc.ReadBlocksResponse]:
    """Yield the bytes of a range of a member, holes as lengths.

    Raises BadInput for a range beyond the end, Refused, PoolUnavailable.
    """
    pool = readable(core, group, request.volume)
    async with core.readers.lend(pool, group.id, request.volume.volume) as lent:
        if request.HasField("cut_time"):
            # after there is a reader: it is of this one, or of one before
            check_cut_time(await taking.found(core, group.id), request.cut_time)
        if request.offset > lent.size_bytes:
            raise BadInput([("offset", f"is beyond the end, {lent.size_bytes}")])
        length = request.length or lent.size_bytes - request.offset
        if request.offset + length > lent.size_bytes:
            raise BadInput([("length", f"the range ends beyond the end, {lent.size_bytes}")])
        # begun in the thread that takes the first part
        parts = cache(lambda reader: _parts(reader, request.offset, length))
        while part := await lent.run(core.limits.call_timeout_s, lambda reader: next(parts(reader), None)):
            yield part


async def allocated_extents(
    core: Core, group: Group, volume: volume_pb2.VolumeRef
) -> AsyncIterator[rpc.ListAllocatedExtentsResponse]:
    """Yield what is not a hole in a member."""
    pool = readable(core, group, volume)
    async with core.readers.lend(pool, group.id, volume.volume) as lent:
        extents = cache(lambda reader: reader.extents(0, reader.size_bytes))
        while batch := await lent.run(core.limits.call_timeout_s, lambda reader: _batch(extents(reader))):
            yield rpc.ListAllocatedExtentsResponse(extents=batch)


async def changed_extents(
    core: Core, group: Group, request: rpc.ListChangedExtentsRequest
) -> AsyncIterator[rpc.ListChangedExtentsResponse]:
    """Yield what differs between two snapshots of a volume."""
    pool = readable(core, group, request.volume)
    if not (await pool.ask(pool.provider.capabilities)).changed_extents:
        raise Refused(
            "CAPABILITY_MISSING",
            f"pool {pool.name} cannot compare snapshots",
            pool=pool.name,
            capability="changed_extents",
        )
    extents = pool.provider.changed_extents(
        group.id, request.volume.volume, request.base_id or None, coarse=request.coarse
    )
    try:
        while batch := await pool.read.run(None, lambda: _batch(extents)):
            # of a snapshot that is deleted meanwhile, a storage may tell what the volume has now
            for group_id in filter(None, (group.id, request.base_id)):
                readable(core, await taking.found(core, group_id), request.volume)
            yield rpc.ListChangedExtentsResponse(extents=batch)
    finally:
        if isinstance(extents, Generator):
            await pool.read.run(core.limits.call_timeout_s, extents.close)


def check_cut_time(group: Group, cut_time: Timestamp) -> None:
    """Raise Refused GROUP_SNAPSHOT_NOT_FOUND unless a group snapshot is the one that was cut then."""
    if group.snapshot.cut_time != cut_time:
        raise Refused(
            "GROUP_SNAPSHOT_NOT_FOUND",
            f"group snapshot {group.id} is not the one that was cut at {cut_time.ToJsonString()}: that was deleted",
            group_snapshot=group.id,
        )


def readable(core: Core, group: Group, volume: volume_pb2.VolumeRef) -> Pool:
    """Return the pool of a member that can be read now, or raise Refused MEMBER_NOT_FOUND or STATE_INVALID."""
    if all(member.volume != volume for member in group.snapshot.members):
        raise Refused(
            "MEMBER_NOT_FOUND",
            f"group snapshot {group.id} has no member {volume.pool}/{volume.volume}",
            group_snapshot=group.id,
            pool=volume.pool,
            volume=volume.volume,
        )
    if group.snapshot.state not in states.READABLE:
        raise states.unreadable(group.id, group.snapshot.state)
    return core.pools.get(volume.pool)


def _parts(reader: BlockReader, offset: int, length: int) -> Iterator[rpc.ReadBlocksResponse]:
    end = offset + length
    position = offset
    for extent in reader.extents(offset, length):
        if extent.offset > position:
            yield rpc.ReadBlocksResponse(offset=position, zero_bytes=extent.offset - position)
        position = extent.offset
        while position < extent.offset + extent.length:
            size = min(CHUNK_BYTES, extent.offset + extent.length - position)
            yield rpc.ReadBlocksResponse(offset=position, data=reader.read(position, size))
            position += size
    if position < end:
        yield rpc.ReadBlocksResponse(offset=position, zero_bytes=end - position)


def _batch(extents: Iterator[Extent]) -> list[rpc.Extent]:
    return [rpc.Extent(offset=extent.offset, length=extent.length) for extent in islice(extents, EXTENTS_A_MESSAGE)]
