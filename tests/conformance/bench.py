"""Short words for what tests do all the time through a gateway."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import pool_pb2, volume_pb2
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.storages import MIB, Storage
from tests.gateway_process import GatewayProcess, reason_of

_numbers = itertools.count(1)


class Bench:
    """A storage, the gateway before it, and short words for what tests do all the time."""

    timeout_s = 60.0
    """How long the gateway may take to answer."""

    def __init__(self, storage: Storage, gateway: GatewayProcess) -> None:
        self.storage = storage
        self.gateway = gateway
        self.number = next(_numbers)
        self.volumes: list[tuple[str, str]] = []
        self.groups: list[str] = []

    @property
    def stub(self) -> Any:
        return self.gateway.stub

    def id(self, word: str = "snap") -> str:
        """A new id; what it names is deleted after the test."""
        self.groups.append(f"t{self.number}-{word}-{len(self.groups)}")
        return self.groups[-1]

    def volume(self, size: int = 4 * MIB, pool: str = "main", image_format: str = "raw", data: bytes = b"") -> str:
        """A new volume; removed after the test."""
        name = f"t{self.number}-{len(self.volumes)}.{image_format}"
        self.storage.create(name, size, pool, image_format)
        self.volumes.append((pool, name))
        if image_format == "raw":
            self.storage.write(name, 0, data or f"{name} as it was".encode() * 1000, pool)
        return name

    def ref(self, volume: str, pool: str = "main") -> volume_pb2.VolumeRef:
        return volume_pb2.VolumeRef(pool=pool, volume=volume)

    def spec(self, *volumes: str | tuple[str, str], **fields: Any) -> pb.GroupSnapshotSpec:
        refs = [self.ref(v) if isinstance(v, str) else self.ref(v[1], v[0]) for v in volumes]
        return pb.GroupSnapshotSpec(volumes=[pb.VolumeSpec(ref=ref) for ref in refs], **fields)

    def prepare(self, group: str, *volumes: Any, **fields: Any) -> pb.GroupSnapshot:
        request = rpc.PrepareGroupSnapshotRequest(id=group, spec=self.spec(*volumes, **fields))
        return self.stub.PrepareGroupSnapshot(request).group_snapshot

    def cut(self, group: str, *volumes: Any, confirm_s: float = 0, **fields: Any) -> pb.GroupSnapshot:
        request = rpc.CreateGroupSnapshotRequest(id=group)
        if volumes:
            request.spec.CopyFrom(self.spec(*volumes, **fields))
        if confirm_s:
            request.confirm_within.FromNanoseconds(int(confirm_s * 1e9))
        return self.stub.CreateGroupSnapshot(request, timeout=self.timeout_s).group_snapshot

    def take(self, group: str, *volumes: Any, **fields: Any) -> pb.GroupSnapshot:
        """cut(), and wait until it is READY."""
        self.cut(group, *volumes, **fields)
        taken = self.settled(group)
        assert taken.state == pb.GROUP_SNAPSHOT_STATE_READY, taken
        return taken

    def settled(self, group: str) -> pb.GroupSnapshot:
        return self.watch(group)[-1]

    def watch(self, group: str) -> list[pb.GroupSnapshot]:
        stream = self.stub.WatchGroupSnapshot(rpc.WatchGroupSnapshotRequest(id=group), timeout=2 * self.timeout_s)
        return [response.group_snapshot for response in stream]

    def get(self, group: str) -> pb.GroupSnapshot:
        return self.stub.GetGroupSnapshot(rpc.GetGroupSnapshotRequest(id=group)).group_snapshot

    def gone(self, group: str) -> bool:
        try:
            self.get(group)
        except grpc.RpcError as error:
            return reason_of(error) == "GROUP_SNAPSHOT_NOT_FOUND"
        return False

    def wait_gone(self, group: str, timeout_s: float | None = None) -> None:
        deadline = time.monotonic() + (timeout_s or self.timeout_s)
        while not self.gone(group):
            assert time.monotonic() < deadline, self.get(group)
            time.sleep(0.05)

    def revert(self, group: str, *volumes: str, **fields: Any) -> pb.GroupSnapshot:
        """Revert and wait until it is done."""
        refs = [self.ref(volume) for volume in volumes]
        begun = self.stub.RevertGroupSnapshot(rpc.RevertGroupSnapshotRequest(id=group, volumes=refs, **fields))
        if begun.group_snapshot.revert.safety_id:
            self.groups.append(begun.group_snapshot.revert.safety_id)
        return self.settled(group)

    def delete(self, group: str) -> None:
        """Delete and wait until it is gone."""
        self.stub.DeleteGroupSnapshot(rpc.DeleteGroupSnapshotRequest(id=group))
        self.wait_gone(group)

    def list(self, **conditions: Any) -> list[pb.GroupSnapshot]:
        request = rpc.ListGroupSnapshotsRequest(page_size=1000, **conditions)
        return list(self.stub.ListGroupSnapshots(request).group_snapshots)

    def read(self, group: str, volume: str, offset: int = 0, length: int = 0, pool: str = "main") -> bytes:
        request = rpc.ReadBlocksRequest(id=group, volume=self.ref(volume, pool), offset=offset, length=length)
        content = b""
        for part in self.stub.ReadBlocks(request, timeout=self.timeout_s):
            assert part.offset == offset + len(content)
            content += part.data or bytes(part.zero_bytes)
        return content

    def pool(self, name: str = "main") -> pool_pb2.Pool:
        return next(pool for pool in self.stub.ListPools(rpc.ListPoolsRequest()).pools if pool.name == name)

    def capabilities(self, pool: str = "main") -> pool_pb2.PoolCapabilities:
        return self.pool(pool).capabilities

    def clean(self) -> None:
        """Remove all that the test made, and see that nothing is left."""
        for group in reversed(self.groups):
            self.delete(group)
        for group in self.groups:
            assert not any(self.storage.exists(group, pool) for pool in self.storage.pools())
        for pool, volume in self.volumes:
            try:
                self.storage.remove(volume, pool)
            except FileNotFoundError:
                continue  # the test had removed it itself


@contextmanager
def watched(bench: Bench, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Clean up after a test; meanwhile the gateway must log nothing but what its `expects_log` marks say."""
    before = len(bench.gateway.log())
    yield bench
    bench.clean()
    expected = [marker.args[0] for marker in request.node.iter_markers("expects_log")]
    for line in bench.gateway.log()[before:]:
        if line.get("level") in ("warning", "error", "garbage") and line["event"] not in expected:
            raise AssertionError(f"the gateway logged {line}")


def refused(reason: str) -> Any:
    """Context that expects an error with a reason of the contract; yields it as pytest's excinfo."""
    return pytest.raises(grpc.RpcError, check=lambda error: reason_of(error) == reason)
