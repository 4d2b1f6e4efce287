"""The contract's calls: each checks who asks and what, then leaves the work to the module of its verb."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import pool_pb2, snapshot_provider_pb2_grpc, volume_pb2
from frostgate.v1 import snapshot_provider_pb2 as rpc
from gateway import cloning, deleting, reverting, states, streaming, taking
from gateway.auth import Identity
from gateway.calls import identity
from gateway.errors import Refused
from gateway.groups import Core
from gateway.journal import Filter, Group
from gateway.nbd import server as nbd
from gateway.pools import Pool
from gateway.validation import decoded_token, page_token, seconds
from providers.base import DiskSource, ProviderError, Volume

_DEFAULT_PAGE = 100
_POLL_S = 30.0
_HEALTH_TIMEOUT_S = 3.0


class SnapshotProvider(snapshot_provider_pb2_grpc.SnapshotProviderServicer):
    """frostgate.v1.SnapshotProvider. Requests are valid when they come here (gateway.calls)."""

    def __init__(self, core: Core) -> None:
        """Take what the verbs need."""
        self._core = core

    async def ListPools(self, request: rpc.ListPoolsRequest, context: Any) -> rpc.ListPoolsResponse:  # noqa: N802
        """Every pool, asked at once; one that hangs is reported UNAVAILABLE after 3 s."""
        caller = identity()
        caller.require("read")
        pools = [pool for pool in self._core.pools.all() if caller.sees(pool.name)]
        return rpc.ListPoolsResponse(pools=await asyncio.gather(*(_pool(pool) for pool in pools)))

    async def ListVolumes(self, request: rpc.ListVolumesRequest, context: Any) -> rpc.ListVolumesResponse:  # noqa: N802
        """Return a page of a pool's volumes by name."""
        identity().require("read", [request.pool])
        pool = self._core.pools.get(request.pool)
        after = decoded_token(request.page_token) if request.page_token else ""
        size = request.page_size or _DEFAULT_PAGE
        volumes = await pool.ask(lambda: pool.provider.volumes(after or "", size + 1))
        more = len(volumes) > size
        return rpc.ListVolumesResponse(
            volumes=[_volume(pool.name, volume) for volume in volumes[:size]],
            next_page_token=page_token(volumes[size - 1].name) if more else "",
        )

    async def GetVolume(self, request: rpc.GetVolumeRequest, context: Any) -> rpc.GetVolumeResponse:  # noqa: N802
        """One volume."""
        identity().require("read", [request.ref.pool])
        pool = self._core.pools.get(request.ref.pool)
        volume = await pool.ask(lambda: pool.provider.volume(request.ref.volume))
        return rpc.GetVolumeResponse(volume=_volume(pool.name, volume))

    async def ResolveVolumes(  # noqa: N802
        self, request: rpc.ResolveVolumesRequest, context: Any
    ) -> rpc.ResolveVolumesResponse:
        """Which volumes disk sources are; two pools that claim the same one are said, not guessed between."""
        caller = identity()
        caller.require("read")
        pools = [pool for pool in self._core.pools.all() if caller.sees(pool.name)]
        return rpc.ResolveVolumesResponse(
            resolutions=await asyncio.gather(*(_resolve(pools, source) for source in request.sources))
        )

    async def PrepareGroupSnapshot(  # noqa: N802
        self, request: rpc.PrepareGroupSnapshotRequest, context: Any
    ) -> rpc.PrepareGroupSnapshotResponse:
        """Reserve."""
        identity().require("snapshot", _spec_pools(request.spec))
        expire_s = seconds(request.expire_after) if request.HasField("expire_after") else taking.DEFAULT_EXPIRE_S
        snapshot = await taking.prepare(self._core, request.id, request.spec, expire_s)
        return rpc.PrepareGroupSnapshotResponse(group_snapshot=self._shown(snapshot))

    async def CreateGroupSnapshot(  # noqa: N802
        self, request: rpc.CreateGroupSnapshotRequest, context: Any
    ) -> rpc.CreateGroupSnapshotResponse:
        """Cut."""
        caller = identity()
        caller.require("snapshot", _spec_pools(request.spec))
        if not request.HasField("spec") and caller.pools is not None:
            await self._visible(caller, request.id, "snapshot")
        snapshot = await taking.create(
            self._core,
            request.id,
            request.spec if request.HasField("spec") else None,
            seconds(request.confirm_within) if request.HasField("confirm_within") else None,
        )
        return rpc.CreateGroupSnapshotResponse(group_snapshot=self._shown(snapshot))

    async def ConfirmGroupSnapshot(  # noqa: N802
        self, request: rpc.ConfirmGroupSnapshotRequest, context: Any
    ) -> rpc.ConfirmGroupSnapshotResponse:
        """Record what was verified."""
        await self._visible(identity(), request.id, "snapshot")
        snapshot = await taking.confirm(self._core, request.id, request.consistency)
        return rpc.ConfirmGroupSnapshotResponse(group_snapshot=self._shown(snapshot))

    async def GetGroupSnapshot(  # noqa: N802
        self, request: rpc.GetGroupSnapshotRequest, context: Any
    ) -> rpc.GetGroupSnapshotResponse:
        """One group snapshot."""
        group = await self._visible(identity(), request.id, "read")
        return rpc.GetGroupSnapshotResponse(group_snapshot=self._shown(group.snapshot))

    async def ListGroupSnapshots(  # noqa: N802
        self, request: rpc.ListGroupSnapshotsRequest, context: Any
    ) -> rpc.ListGroupSnapshotsResponse:
        """Return a page of group snapshots, newest first."""
        caller = identity()
        caller.require("read")
        condition = Filter(
            vm_uuid=request.vm_uuid,
            volume=(request.volume.pool, request.volume.volume) if request.HasField("volume") else None,
            labels=dict(request.labels),
            states=tuple(request.states),
            pools=caller.pools,
        )
        size = request.page_size or _DEFAULT_PAGE
        position = decoded_token(request.page_token) if request.page_token else None
        groups = await self._core.journal.page(condition, int(position) if position else None, size + 1)
        more = len(groups) > size
        return rpc.ListGroupSnapshotsResponse(
            group_snapshots=[self._shown(group.snapshot) for group in groups[:size]],
            next_page_token=page_token(str(groups[size - 1].seq)) if more else "",
        )

    async def WatchGroupSnapshot(  # noqa: N802
        self, request: rpc.WatchGroupSnapshotRequest, context: Any
    ) -> AsyncIterator[rpc.WatchGroupSnapshotResponse]:
        """Every change until it is settled or gone."""
        group: Group | None = await self._visible(identity(), request.id, "read")
        live = self._core.live(request.id)
        changed = asyncio.Event()
        live.watchers.add(changed)
        try:
            last: pb.GroupSnapshot | None = None
            while group is not None:
                shown = self._shown(group.snapshot)
                if shown != last:
                    yield rpc.WatchGroupSnapshotResponse(group_snapshot=shown)
                    last = shown
                if shown.state in states.SETTLED:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), _POLL_S)
                changed.clear()
                group = await self._core.journal.get(request.id)
        finally:
            live.watchers.discard(changed)

    async def RevertGroupSnapshot(  # noqa: N802
        self, request: rpc.RevertGroupSnapshotRequest, context: Any
    ) -> rpc.RevertGroupSnapshotResponse:
        """Begin a revert."""
        await self._visible(identity(), request.id, "revert")
        snapshot = await reverting.revert(
            self._core,
            request.id,
            request.volumes,
            request.safety_id,
            no_safety=request.no_safety,
            instant=request.instant,
        )
        return rpc.RevertGroupSnapshotResponse(group_snapshot=self._shown(snapshot))

    async def DeleteGroupSnapshot(  # noqa: N802
        self, request: rpc.DeleteGroupSnapshotRequest, context: Any
    ) -> rpc.DeleteGroupSnapshotResponse:
        """Begin a deletion."""
        caller = identity()
        caller.require("delete")
        try:
            await self._visible(caller, request.id, "delete")
        except Refused as refused:
            if refused.reason != "GROUP_SNAPSHOT_NOT_FOUND":
                raise
            return rpc.DeleteGroupSnapshotResponse()
        snapshot = await deleting.delete(self._core, request.id)
        if snapshot is None:
            return rpc.DeleteGroupSnapshotResponse()
        return rpc.DeleteGroupSnapshotResponse(group_snapshot=self._shown(snapshot))

    async def CloneGroupSnapshot(  # noqa: N802
        self, request: rpc.CloneGroupSnapshotRequest, context: Any
    ) -> rpc.CloneGroupSnapshotResponse:
        """Make new volumes from members."""
        await self._visible(identity(), request.id, "snapshot")
        volumes = await cloning.clone(self._core, request.id, request.clones)
        return rpc.CloneGroupSnapshotResponse(
            volumes=[_volume(clone.source.pool, volume) for clone, volume in zip(request.clones, volumes, strict=True)]
        )

    async def ReadBlocks(  # noqa: N802
        self, request: rpc.ReadBlocksRequest, context: Any
    ) -> AsyncIterator[rpc.ReadBlocksResponse]:
        """Stream a range of a member."""
        group = await self._visible(identity(), request.id, "read")
        async for part in streaming.read_blocks(self._core, group, request):
            yield part

    async def ListAllocatedExtents(  # noqa: N802
        self, request: rpc.ListAllocatedExtentsRequest, context: Any
    ) -> AsyncIterator[rpc.ListAllocatedExtentsResponse]:
        """Stream what is not a hole."""
        group = await self._visible(identity(), request.id, "read")
        async for part in streaming.allocated_extents(self._core, group, request.volume):
            yield part

    async def ListChangedExtents(  # noqa: N802
        self, request: rpc.ListChangedExtentsRequest, context: Any
    ) -> AsyncIterator[rpc.ListChangedExtentsResponse]:
        """Stream what differs between two snapshots."""
        group = await self._visible(identity(), request.id, "read")
        if request.base_id:
            base = await self._visible(identity(), request.base_id, "read")
            streaming.readable(self._core, base, request.volume)
        async for part in streaming.changed_extents(self._core, group, request):
            yield part

    async def _visible(self, caller: Identity, group_id: str, right: Any) -> Group:
        """Return a group on which the caller has the right, or raise NOT_FOUND or PERMISSION_DENIED."""
        caller.require(right)
        group = await taking.found(self._core, group_id)
        caller.require(right, sorted({member.volume.pool for member in group.snapshot.members}))
        return group

    def _shown(self, snapshot: pb.GroupSnapshot) -> pb.GroupSnapshot:
        """Return a group snapshot as clients see it: with the progress, with paths and addresses of READY ones only."""
        shown = pb.GroupSnapshot()
        shown.CopyFrom(snapshot)
        if shown.state not in states.READABLE:
            for member in shown.members:
                member.local_path = ""
        elif self._core.nbd_socket and identity().local:
            for member in shown.members:
                member.nbd_uri = nbd.uri(self._core.nbd_socket, shown.id, member.volume)
        working = shown.state in (states.COPYING, states.REVERTING, states.DELETING)
        if working and (progress := self._core.live(snapshot.id).progress()):
            shown.progress.CopyFrom(progress)
        return shown


def _spec_pools(spec: pb.GroupSnapshotSpec) -> Sequence[str]:
    return sorted({volume.ref.pool for volume in spec.volumes})


def _volume(pool: str, volume: Volume) -> volume_pb2.Volume:
    return volume_pb2.Volume(
        ref=volume_pb2.VolumeRef(pool=pool, volume=volume.name),
        size_bytes=volume.size_bytes,
        allocated_bytes=volume.allocated_bytes,
        format=volume.format,
        in_use=volume.in_use,
        users=volume.users,
    )


async def _pool(pool: Pool) -> pool_pb2.Pool:
    shown = pool_pb2.Pool(name=pool.name, kind=pool.kind)
    try:
        capabilities, space = await asyncio.gather(
            pool.query.run(_HEALTH_TIMEOUT_S, pool.provider.capabilities),
            pool.query.run(_HEALTH_TIMEOUT_S, pool.provider.space),
        )
    except (ProviderError, Refused) as error:
        shown.health.status = pool_pb2.PoolHealth.STATUS_UNAVAILABLE
        shown.health.message = error.message
        return shown
    shown.health.status = pool_pb2.PoolHealth.STATUS_HEALTHY
    shown.space.total_bytes = space.total_bytes
    shown.space.free_bytes = space.free_bytes
    for field in pool_pb2.PoolCapabilities.DESCRIPTOR.fields:
        setattr(shown.capabilities, field.name, getattr(capabilities, field.name))
    return shown


async def _resolve(pools: list[Pool], source: volume_pb2.DiskSource) -> volume_pb2.DiskResolution:
    kind = source.WhichOneof("source")
    asked = DiskSource(
        file=source.file if kind == "file" else None,
        rbd=source.rbd.name if kind == "rbd" else None,
        block_device=source.block_device if kind == "block_device" else None,
        monitors=tuple(source.rbd.monitors) if kind == "rbd" else (),
    )
    answers = await asyncio.gather(
        *(pool.ask(partial(pool.provider.resolve, asked)) for pool in pools), return_exceptions=True
    )
    known = [(pool.name, name) for pool, name in zip(pools, answers, strict=True) if isinstance(name, str)]
    resolution = volume_pb2.DiskResolution(source=source)
    if len(known) == 1:
        resolution.volume.pool, resolution.volume.volume = known[0]
    elif known:
        resolution.unresolved_reason = "lies in several pools: " + ", ".join(name for name, _ in known)
    else:
        away = [pool.name for pool, answer in zip(pools, answers, strict=True) if isinstance(answer, BaseException)]
        also = f"; not asked, because they do not answer: {', '.join(away)}" if away else ""
        resolution.unresolved_reason = f"lies in none of the pools {', '.join(pool.name for pool in pools)}{also}"
    return resolution
