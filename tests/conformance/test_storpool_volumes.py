"""Which volumes are a StorPool pool's, by which names, on which devices, and what the configuration must say."""

import os
from pathlib import Path

import grpc
import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import pool_pb2, volume_pb2
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.conftest import Bench, refused
from tests.conformance.storages import MIB
from tests.conformance.storpool import cluster, storpool
from tests.gateway_process import GatewayProcess, reason_of
from tests.lab.storpool import CLIENT, TEMPLATE, StorpoolSim

pytestmark = pytest.mark.parametrize("storage", ["storpool"], indirect=True)

DONE = pb.Revert.STATE_DONE


def test_volumes_are_named_by_name_global_id_and_device(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    (found,) = cluster(bench).api().volumeList(volume)
    by_id = f"~{found.globalId}"
    shown = bench.stub.GetVolume(rpc.GetVolumeRequest(ref=bench.ref(by_id))).volume
    assert (shown.ref.volume, shown.size_bytes) == (volume, 4 * MIB)
    taken = bench.take(group, by_id)
    assert taken.members[0].volume.volume == by_id
    assert bench.read(group, by_id, 0, 5) == f"{volume} as it was"[:5].encode()
    assert bench.revert(group).revert.state == DONE
    with refused("INVALID_ARGUMENT"):
        bench.cut(bench.id(), volume, by_id)
    devices, ids = cluster(bench).devices, cluster(bench).devices_by_id
    cases = {
        f"{devices}/{volume}": ("main", volume),
        f"{ids}/{found.globalId}": ("main", volume),
        f"{devices}/missing": ("", ""),
        f"{devices}/../storpool/{volume}": ("", ""),
        f"{ids}/{volume}": ("", ""),
        f"{storpool(bench).other.devices}/{volume}": ("", ""),
        f"/dev/sda/{volume}": ("", ""),
        f"{devices}/": ("", ""),
    }
    sources = [volume_pb2.DiskSource(block_device=path) for path in cases]
    answers = bench.stub.ResolveVolumes(rpc.ResolveVolumesRequest(sources=sources)).resolutions
    assert [(one.volume.pool, one.volume.volume) for one in answers] == list(cases.values())


def test_volumes_without_a_name_are_known_by_their_global_id(bench: Bench) -> None:
    """As CloudStack makes them."""
    api = cluster(bench).api()
    global_id = api.volumeCreate({"size": 4 * MIB, "template": TEMPLATE}).globalId
    name, device = f"~{global_id}", cluster(bench).devices_by_id / global_id
    bench.volumes.append(("main", name))

    def content(write: bytes = b"") -> bytes:
        api.volumesReassignWait({"reassign": [{"volume": name, "rw": [CLIENT]}]})
        with device.open("r+b", buffering=0) as file:
            if write:
                file.write(write)
            found = os.pread(file.fileno(), 8, 0)
        cluster(bench).detach(name)
        return found

    content(b"original")
    listed = bench.stub.ListVolumes(rpc.ListVolumesRequest(pool="main")).volumes
    assert name in [found.ref.volume for found in listed]
    source = volume_pb2.DiskSource(block_device=str(device))
    answer = bench.stub.ResolveVolumes(rpc.ResolveVolumesRequest(sources=[source])).resolutions[0]
    assert answer.volume.volume == name
    group = bench.id()
    bench.take(group, name)
    content(b"damaged!")
    assert bench.read(group, name, 0, 8) == b"original"
    assert bench.revert(group).revert.state == DONE
    assert content() == b"original"


@pytest.mark.parametrize("selection", [{"name_prefix": "mine-"}, {"tag": "tenant=a"}], ids=str)
def test_a_pool_is_what_a_prefix_or_a_tag_selects(bench: Bench, tmp_path: Path, selection: dict[str, str]) -> None:
    api, number = cluster(bench).api(), bench.number
    tags = {"mine-yes": {"tenant": "a"}, "mine-too": {"tenant": "a"}, "yours": {"tenant": "b"}}
    for name, marks in tags.items():
        api.volumeCreate({"name": f"{name}-{number}", "size": MIB, "template": "oracle", "tags": marks})
    pools = {"only": cluster(bench).pool(**selection)}
    target = f"mine-clone-{number}"
    try:
        with GatewayProcess(tmp_path / "gateway", pools) as gateway:
            own = Bench(bench.storage, gateway)
            listed = gateway.stub.ListVolumes(rpc.ListVolumesRequest(pool="only")).volumes
            assert [found.ref.volume for found in listed] == [f"mine-too-{number}", f"mine-yes-{number}"]
            with refused("VOLUME_NOT_FOUND"):
                own.cut(own.id(), ("only", f"yours-{number}"))
            group = own.id()
            own.take(group, ("only", f"mine-yes-{number}"))
            clone = rpc.CloneSpec(source=own.ref(f"mine-yes-{number}", "only"), target_volume=target)
            made = gateway.stub.CloneGroupSnapshot(rpc.CloneGroupSnapshotRequest(id=group, clones=[clone]))
            assert made.volumes[0].ref.volume == target
            own.delete(group)
            listed = gateway.stub.ListVolumes(rpc.ListVolumesRequest(pool="only")).volumes
            assert target in [found.ref.volume for found in listed]
            left = [one for one in api.snapshotsList() if (one.tags or {}).get("frostgate") == group]
            assert all(one.deleted for one in left)  # kept for the clone, until it needs it no more
    finally:
        for name in (*(f"{name}-{number}" for name in tags), target):
            storpool(bench).remove(name)


def test_a_volume_is_raw_and_of_the_pools_template(bench: Bench) -> None:
    volume = bench.volume(pool="small")
    assert TEMPLATE != "small"
    with refused("VOLUME_NOT_FOUND"):
        bench.stub.GetVolume(rpc.GetVolumeRequest(ref=bench.ref(volume, "main")))
    spec = bench.spec(("small", volume))
    spec.volumes[0].format = "qcow2"
    with refused("INVALID_ARGUMENT"):
        bench.stub.CreateGroupSnapshot(rpc.CreateGroupSnapshotRequest(id=bench.id(), spec=spec))


def test_pools_of_one_cluster_share_a_group_and_keep_apart(bench: Bench) -> None:
    here, there, group = bench.volume(), bench.volume(pool="small"), bench.id()
    bench.take(group, here, ("small", there))
    assert bench.storage.member_digest(group, there, "small") == bench.storage.digest(there, "small")
    bench.delete(group)
    assert not bench.storage.exists(group, "main")
    assert not bench.storage.exists(group, "small")


def test_clones_have_names_that_storpool_can_have(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    for target in ("with space", "a@b", "x" * 200, "frostgate.mine", "~a.b.c"):
        clone = rpc.CloneSpec(source=bench.ref(volume), target_volume=target)
        with refused("INVALID_ARGUMENT"):
            bench.stub.CloneGroupSnapshot(rpc.CloneGroupSnapshotRequest(id=group, clones=[clone]))


def test_devices_are_block_devices_as_those_of_storpool_are(bench: Bench, tmp_path: Path) -> None:
    with StorpoolSim("storpool-loop", loop=True) as blocks:
        device = blocks.create("disk", 16 * MIB)
        assert device.is_block_device()
        with device.open("r+b", buffering=0) as file:
            for offset in (0, 5 * MIB, 16 * MIB - 4096):
                os.pwrite(file.fileno(), b"x" * 4096, offset)
            os.fsync(file.fileno())
        with GatewayProcess(tmp_path / "gateway", {"main": blocks.pool()}) as gateway:
            own = Bench(bench.storage, gateway)
            old, new = own.id(), own.id()
            own.take(old, "disk")
            with device.open("r+b", buffering=0) as file:
                os.pwrite(file.fileno(), b"y" * 4096, 9 * MIB)
                os.fsync(file.fileno())
            own.take(new, "disk")
            request = rpc.ListAllocatedExtentsRequest(id=old, volume=own.ref("disk"))
            allocated = [one for part in gateway.stub.ListAllocatedExtents(request) for one in part.extents]
            assert [(one.offset, one.length) for one in allocated] == [
                (0, 4096),
                (5 * MIB, 4096),
                (16 * MIB - 4096, 4096),
            ]
            request = rpc.ListChangedExtentsRequest(id=new, volume=own.ref("disk"), base_id=old)
            changed = [one for part in gateway.stub.ListChangedExtents(request) for one in part.extents]
            assert [(one.offset, one.length) for one in changed] == [(9 * MIB, 4096)]
            assert own.read(old, "disk", 9 * MIB, 4096) == bytes(4096)
            blocks.detach("disk")
            assert own.revert(old).revert.state == DONE
            for group in reversed(own.groups):
                own.delete(group)
            assert not blocks.api().attachmentsList()


def test_calls_go_to_all_clusters_where_the_pool_says_so(bench: Bench, tmp_path: Path) -> None:
    volume = bench.volume()
    then = bench.storage.digest(volume)
    with GatewayProcess(tmp_path / "gateway", {"main": cluster(bench).pool(multi_cluster=True)}) as gateway:
        own = Bench(bench.storage, gateway)
        group = own.id()
        own.take(group, volume)
        bench.storage.write(volume, 0, b"damage")
        assert own.revert(group).revert.state == DONE
        assert bench.storage.digest(volume) == then
        for one in reversed(own.groups):
            own.delete(one)


@pytest.mark.parametrize("lost", ["SP_OURID", "SP_AUTH_TOKEN"])
def test_what_the_configuration_lacks_is_said_before_anything_is_done(bench: Bench, tmp_path: Path, lost: str) -> None:
    conf = tmp_path / "storpool.conf"
    conf.write_text("".join(f"{line}\n" for line in cluster(bench).conf.read_text().split() if lost not in line))
    volume, group = bench.volume(), bench.id()
    token = {"token": "not-the-token"} if lost == "SP_AUTH_TOKEN" else {}
    pools = {"main": cluster(bench).pool(conf=str(conf), **token), "other": bench.storage.pools()["main"]}
    with GatewayProcess(tmp_path / "gateway", pools) as gateway:
        listed = {pool.name: pool for pool in gateway.stub.ListPools(rpc.ListPoolsRequest()).pools}
        with pytest.raises(grpc.RpcError) as caught:
            Bench(bench.storage, gateway).prepare(group, volume)
        if lost == "SP_OURID":
            assert not listed["main"].capabilities.read_blocks
            assert reason_of(caught.value) == "CAPABILITY_MISSING"
            assert "client_id" in caught.value.details()
        else:
            assert listed["main"].health.status == pool_pb2.PoolHealth.STATUS_UNAVAILABLE
            assert "token" in listed["main"].health.message
            assert listed["other"].health.status == pool_pb2.PoolHealth.STATUS_HEALTHY
            assert reason_of(caught.value) == "POOL_UNAVAILABLE"
            assert "not-the-token" not in (gateway.directory / "gateway.log").read_text()
