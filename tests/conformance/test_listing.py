"""Listing pools, volumes and group snapshots; resolving disks; what does not answer."""

import os
from pathlib import Path

import grpc
import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import pool_pb2, volume_pb2
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.conftest import FILES, Bench, refused
from tests.conformance.storages import MIB
from tests.gateway_process import error_info


def test_pools_say_what_they_can(bench: Bench) -> None:
    pools = {pool.name: pool for pool in bench.stub.ListPools(rpc.ListPoolsRequest()).pools}
    assert sorted(pools) == sorted(bench.storage.pools())
    for pool in pools.values():
        assert pool.health.status == pool_pb2.PoolHealth.STATUS_HEALTHY
        assert 0 < pool.space.free_bytes <= pool.space.total_bytes
        assert pool.capabilities.instant_cut == bench.storage.clones
        assert pool.capabilities.revert
        assert pool.capabilities.read_blocks


def test_a_pool_that_is_away_is_said_and_stalls_no_other(bench: Bench) -> None:
    volume, lost = bench.volume(), bench.volume(pool="other")
    with bench.storage.away("other"):
        pools = {pool.name: pool.health for pool in bench.stub.ListPools(rpc.ListPoolsRequest()).pools}
        assert pools["other"].status == pool_pb2.PoolHealth.STATUS_UNAVAILABLE
        assert pools["other"].message
        with refused("POOL_UNAVAILABLE") as caught:
            bench.stub.GetVolume(rpc.GetVolumeRequest(ref=bench.ref(lost, "other")))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        bench.take(bench.id(), volume)
    assert bench.stub.GetVolume(rpc.GetVolumeRequest(ref=bench.ref(lost, "other"))).volume.size_bytes == 4 * MIB


@pytest.mark.expects_log("undone")
@pytest.mark.expects_log("deletion waits")
def test_none_when_one_pool_is_away(bench: Bench) -> None:
    volume, lost, group = bench.volume(), bench.volume(pool="other"), bench.id()
    with bench.storage.away("other"), refused("POOL_UNAVAILABLE"):
        bench.cut(group, volume, ("other", lost))
    bench.wait_gone(group)
    assert not bench.storage.exists(group)


def test_a_volume_tells_its_size_and_who_uses_it(bench: Bench) -> None:
    volume = bench.volume(64 * MIB)
    found = bench.stub.GetVolume(rpc.GetVolumeRequest(ref=bench.ref(volume))).volume
    assert (found.size_bytes, found.format, found.in_use) == (64 * MIB, "raw", False)
    assert 0 < found.allocated_bytes <= 4 * MIB
    with bench.storage.in_use(volume) as user:
        found = bench.stub.GetVolume(rpc.GetVolumeRequest(ref=bench.ref(volume))).volume
    assert found.in_use
    assert user in found.users[0]


def test_volumes_are_paged_by_name_while_they_come_and_go(bench: Bench) -> None:
    names = sorted(bench.volume(MIB, "other") for _ in range(7))
    seen: list[str] = []
    request = rpc.ListVolumesRequest(pool="other", page_size=2)
    while True:
        page = bench.stub.ListVolumes(request)
        seen += [volume.ref.volume for volume in page.volumes]
        if len(seen) == 4:
            bench.storage.remove(names[0], "other")
            bench.storage.remove(names[5], "other")
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert seen == [name for name in names if name != names[5]]


@FILES
def test_only_volumes_are_listed(bench: Bench) -> None:
    volume, group = bench.volume(pool="other"), bench.id()
    bench.take(group, ("other", volume))
    root = Path(bench.storage.source(volume, "other")["file"]).parent
    (root / "directory").mkdir()
    (root / "link.raw").symlink_to(root / volume)
    (root / ".hidden").touch()
    os.mkfifo(root / "fifo")
    (root / "line\nbreak").touch()
    try:
        listed = bench.stub.ListVolumes(rpc.ListVolumesRequest(pool="other")).volumes
        assert [found.ref.volume for found in listed] == [volume]
        for name in ("directory", "link.raw", "fifo"):
            with refused("VOLUME_NOT_FOUND"):
                bench.cut(bench.id(), ("other", name))
    finally:
        (root / "directory").rmdir()
        for name in ("link.raw", ".hidden", "fifo", "line\nbreak"):
            (root / name).unlink()


@FILES
def test_disks_are_resolved_to_volumes_and_never_guessed(bench: Bench) -> None:
    volume = bench.volume()
    path = bench.storage.source(volume)["file"]
    directory, name = os.path.split(path)
    sources = {
        path: volume,
        f"/mnt/as-the-hypervisor-sees-it/{name}": volume,
        f"{directory}/missing.raw": "",
        f"{directory}/../{os.path.basename(directory)}/{name}": "",
        f"/mnt/as-the-hypervisor-sees-it/../x/{name}": "",
        "/etc/passwd": "",
        f"{directory}/.frostgate/x/{name}": "",
    }
    asked = [volume_pb2.DiskSource(file=source) for source in sources]
    asked += [
        volume_pb2.DiskSource(rbd=volume_pb2.RbdSource(name="pool/image")),
        volume_pb2.DiskSource(block_device="/dev/null"),
    ]
    resolved = bench.stub.ResolveVolumes(rpc.ResolveVolumesRequest(sources=asked)).resolutions
    assert [found.volume.volume for found in resolved] == [*sources.values(), "", ""]
    assert [found.source for found in resolved] == asked
    assert all(bool(found.unresolved_reason) != bool(found.volume.volume) for found in resolved)


def test_snapshots_are_listed_newest_first_and_by_conditions(bench: Bench) -> None:
    first, second = bench.volume(), bench.volume()
    vm = pb.VmRecord(uuid=f"10000000-0000-0000-0000-{bench.number:012d}", name="vm")
    a, b, c = (bench.id() for _ in range(3))
    bench.take(a, first, labels={"n": str(bench.number), "x": "1"})
    bench.take(b, first, second, labels={"n": str(bench.number)}, vm=vm)
    bench.prepare(c, second, labels={"n": str(bench.number)})

    def ids(**conditions: object) -> list[str]:
        return [found.id for found in bench.list(**conditions)]

    assert ids(labels={"n": str(bench.number)}) == [c, b, a]
    assert ids(labels={"n": str(bench.number), "x": "1"}) == [a]
    assert ids(volume=bench.ref(first)) == [b, a]
    assert ids(volume=bench.ref(second), states=[pb.GROUP_SNAPSHOT_STATE_PREPARED]) == [c]
    assert ids(vm_uuid=vm.uuid) == [b]
    assert ids(volume=bench.ref(first), labels={"x": "2"}) == []


def test_paging_is_stable_while_snapshots_come_and_go(bench: Bench) -> None:
    volume, label = bench.volume(), {"page": str(bench.number)}
    groups = [bench.id() for _ in range(7)]
    for group in groups:
        bench.take(group, volume, labels=label)
    seen: list[str] = []
    request = rpc.ListGroupSnapshotsRequest(page_size=2, labels=label)
    while True:
        page = bench.stub.ListGroupSnapshots(request)
        seen += [found.id for found in page.group_snapshots]
        if len(seen) == 2:
            bench.take(bench.id("new"), volume, labels=label)
            bench.delete(groups[6])
            bench.delete(groups[3])
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert seen == [groups[number] for number in (6, 5, 4, 2, 1, 0)]


@pytest.mark.parametrize(
    ("call", "reason", "name"),
    [
        (lambda b: b.get("missing"), "GROUP_SNAPSHOT_NOT_FOUND", ("group_snapshot", "missing")),
        (lambda b: b.watch("missing"), "GROUP_SNAPSHOT_NOT_FOUND", ("group_snapshot", "missing")),
        (lambda b: b.revert("missing"), "GROUP_SNAPSHOT_NOT_FOUND", ("group_snapshot", "missing")),
        (lambda b: b.read("missing", "v"), "GROUP_SNAPSHOT_NOT_FOUND", ("group_snapshot", "missing")),
        (lambda b: b.stub.ListVolumes(rpc.ListVolumesRequest(pool="no")), "POOL_NOT_FOUND", ("pool", "no")),
        (lambda b: b.cut("x", ("no", "v")), "POOL_NOT_FOUND", ("pool", "no")),
        (lambda b: b.stub.GetVolume(rpc.GetVolumeRequest(ref=b.ref("no"))), "VOLUME_NOT_FOUND", ("volume", "no")),
    ],
)
def test_what_is_not_there_is_named(bench: Bench, call: object, reason: str, name: tuple[str, str]) -> None:
    with refused(reason) as caught:
        call(bench)  # type: ignore[operator]
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    info = error_info(caught.value)
    assert info.metadata[name[0]] == name[1]
    assert info.domain == "frostgate"
    assert info.metadata["request_id"]
