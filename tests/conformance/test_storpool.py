"""What only StorPool can be or do: lost answers, half a group, attachments, tags, global ids, forced reverts."""

import base64
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import pool_pb2, volume_pb2
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.conftest import Bench, refused
from tests.conformance.storages import MIB
from tests.conformance.storpool import Storpool
from tests.gateway_process import GatewayProcess, error_info, reason_of
from tests.lab.storpool import CLIENT, TEMPLATE, StorpoolSim

pytestmark = pytest.mark.parametrize("storage", ["storpool"], indirect=True)

READY = pb.GROUP_SNAPSHOT_STATE_READY
DONE = pb.Revert.STATE_DONE
CUT = "VolumesGroupSnapshot"


def storpool(bench: Bench) -> Storpool:
    assert isinstance(bench.storage, Storpool)
    return bench.storage


def cluster(bench: Bench) -> StorpoolSim:
    return storpool(bench).main


def snapshots(bench: Bench, group: str) -> list[str]:
    """Names of the volumes of which there are snapshots of a group."""
    return sorted(one.tags["frostgate-volume"] for one in storpool(bench).snapshots(group))


def attachments(bench: Bench, name: str) -> list[tuple[int, str]]:
    """Clients and rights of a volume or snapshot."""
    return sorted((one.client, one.rights) for one in cluster(bench).api().attachmentsList() if one.volume == name)


def wait(condition: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lose_journal(own: Bench) -> Any:
    """Kill the gateway, remove its journal, and rebuild it."""
    own.gateway.kill()
    for path in own.gateway.directory.glob("journal.db*"):
        path.unlink()
    outcome = json.loads(own.gateway.cli("reconcile", "--config", own.gateway.config, check=True).stdout)
    own.gateway.start()
    return outcome


def test_all_volumes_are_cut_by_one_call(bench: Bench) -> None:
    volumes, group = [bench.volume() for _ in range(8)], bench.id()
    bench.prepare(group, *volumes)
    cluster(bench).forget_calls()
    members = bench.cut(group).members
    bench.settled(group)
    assert cluster(bench).calls()[CUT] == 1
    assert all(member.atomic for member in members)
    assert {member.handle for member in members} == {f"~{one.globalId}" for one in storpool(bench).snapshots(group)}


@pytest.mark.expects_log("looking for what the cut did")
def test_a_cut_whose_answer_is_lost_is_found_and_never_made_twice(bench: Bench) -> None:
    volumes, group = [bench.volume() for _ in range(3)], bench.id()
    before = [bench.storage.digest(volume) for volume in volumes]
    bench.prepare(group, *volumes)
    cluster(bench).forget_calls()
    cluster(bench).inject(CUT, "cut-after")
    first = bench.cut(group)
    for volume in volumes:
        bench.storage.write(volume, 0, b"later")
    assert bench.settled(group).state == READY
    assert bench.cut(group, *volumes).cut_time == first.cut_time
    assert cluster(bench).calls()[CUT] == 1
    assert snapshots(bench, group) == volumes
    assert [bench.storage.member_digest(group, volume) for volume in volumes] == before


@pytest.mark.expects_log("looking for what the cut did")
@pytest.mark.expects_log("undone")
@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "cut-before"},
        {"kind": "half"},
        {"kind": "half", "transient": True},
        {"kind": "error", "transient": True},
        {"kind": "error", "name": "internalError"},
    ],
    ids=str,
)
def test_a_cut_that_fails_or_is_half_done_leaves_nothing_and_is_not_repeated(bench: Bench, fault: Any) -> None:
    volumes, group = [bench.volume() for _ in range(4)], bench.id()
    bench.prepare(group, *volumes)
    cluster(bench).forget_calls()
    cluster(bench).inject(CUT, **fault)
    with refused("POOL_UNAVAILABLE") as caught:
        bench.cut(group)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    bench.wait_gone(group)
    assert cluster(bench).calls()[CUT] == 1
    assert not bench.storage.exists(group)
    bench.take(group, *volumes)
    assert snapshots(bench, group) == volumes


def test_what_is_transient_is_repeated_outside_the_window(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    for method in ("Volume", "SnapshotsList", "VolumeCreate", "VolumesReassignWait", "VolumeUpdate"):
        cluster(bench).inject(method, "error", transient=True, name="busyNow")
    bench.take(group, volume)
    bench.storage.write(volume, 0, b"damage")
    cluster(bench).inject("VolumeRevert", "error", transient=True, count=2)
    assert bench.revert(group).revert.state == DONE
    assert bench.storage.digest(volume) == bench.storage.member_digest(group, volume)


def test_an_answer_lost_while_settling_makes_no_second_record(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    cluster(bench).inject("VolumeCreate", "cut-after")
    bench.take(group, volume)
    listed = cluster(bench).api().volumesList()
    assert len([one for one in listed if (one.tags or {}).get("frostgate") == group]) == 1


def test_a_cut_carried_out_late_is_nobodys_and_goes_with_the_group(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    before = bench.storage.digest(volume)
    bench.take(group, volume)
    (ours,) = storpool(bench).snapshots(group)
    bench.storage.write(volume, 0, b"later")
    late = {"volume": volume, "tags": {**ours.tags, "frostgate-cut": "another"}}
    cluster(bench).api().snapshotCreateGroup({"volumes": [late]})
    assert bench.read(group, volume)[:5] != b"later"
    assert bench.revert(group, no_safety=True).revert.state == DONE
    assert bench.storage.digest(volume) == before
    bench.delete(group)
    assert not storpool(bench).snapshots(group)


def test_a_cut_carried_out_after_it_was_given_up_is_removed(bench: Bench, tmp_path: Path) -> None:
    volume = bench.volume()
    with GatewayProcess(tmp_path / "gateway", {"main": cluster(bench).pool(cut_timeout_s=0.5)}) as gateway:
        own = Bench(bench.storage, gateway)
        group = own.id()
        own.prepare(group, volume)
        cluster(bench).inject(CUT, "delay", delay_s=3)
        with refused("POOL_UNAVAILABLE"):
            own.cut(group)
        own.wait_gone(group)
        wait(lambda: snapshots(bench, group) == [volume])
        wait(lambda: snapshots(bench, group) == [])


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


def test_a_volume_that_was_resized_is_reverted_to_its_size(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    then = bench.storage.digest(volume)
    bench.take(group, volume)
    bench.storage.resize(volume, 9 * MIB)
    assert bench.revert(group).revert.state == DONE
    assert bench.storage.digest(volume) == then


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


def test_a_snapshot_attached_elsewhere_is_not_deleted_and_the_client_is_named(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    (snapshot,) = storpool(bench).snapshots(group)
    by_id = f"~{snapshot.globalId}"
    cluster(bench).api().volumesReassignWait({"reassign": [{"snapshot": by_id, "ro": [3]}]})
    with refused("SNAPSHOT_IN_USE") as caught:
        bench.delete(group)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "client 3" in error_info(caught.value).metadata["users"]
    assert bench.get(group).state == READY
    cluster(bench).api().volumesReassignWait({"reassign": [{"snapshot": by_id, "detach": [3]}]})
    bench.delete(group)


@pytest.mark.expects_log("revert failed, nothing was changed")
def test_a_volume_attached_read_only_is_not_reverted_either(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    cluster(bench).attach(volume, 3, "ro")
    outcome = bench.revert(group)
    assert outcome.revert.state == pb.Revert.STATE_FAILED
    assert outcome.revert.failure.reason == "VOLUME_IN_USE"
    assert "client 3" in outcome.revert.failure.metadata["users"]
    cluster(bench).detach(volume)


@pytest.fixture
def forced(storage: Storpool, tmp_path: Path) -> Any:
    """A gateway of the test's own, whose pool may detach volumes."""
    pools = storage.pools()
    pools["main"]["force_detach"] = True
    with GatewayProcess(tmp_path / "forced", pools, drain_s=5) as running:
        made = Bench(storage, running)
        yield made
        made.clean()


def test_where_it_is_allowed_attached_volumes_are_reverted_and_attached_again(forced: Bench) -> None:
    first, second, idle, group = forced.volume(), forced.volume(), forced.volume(), forced.id()
    forced.take(group, first, second, idle)
    then = [forced.storage.digest(volume) for volume in (first, second, idle)]
    for volume in (first, second, idle):
        forced.storage.write(volume, 0, b"damage")
    cluster(forced).attach(first, 2)
    cluster(forced).attach(first, 3, "ro")
    cluster(forced).attach(second, CLIENT)
    assert forced.revert(group).revert.state == DONE
    assert attachments(forced, first) == [(2, "rw"), (3, "ro")]
    assert attachments(forced, second) == [(CLIENT, "rw")]
    assert attachments(forced, idle) == []
    with (cluster(forced).devices / second).open("rb") as device:
        assert device.read(4) == f"{second}"[:4].encode()
    for volume in (first, second):
        cluster(forced).detach(volume)
    assert [forced.storage.digest(volume) for volume in (first, second, idle)] == then


def test_a_forced_revert_goes_on_after_a_crash_and_attaches_again(forced: Bench) -> None:
    volumes, group = [forced.volume() for _ in range(3)], forced.id()
    forced.take(group, *volumes)
    then = [forced.storage.digest(volume) for volume in volumes]
    for volume in volumes:
        forced.storage.write(volume, 0, b"damage")
        cluster(forced).attach(volume, 2)
    half_done(forced, group)
    assert [attachments(forced, volume) for volume in volumes] == [[], [], []]
    forced.gateway.start()
    assert forced.settled(group).revert.state == DONE
    assert [attachments(forced, volume) for volume in volumes] == [[(2, "rw")]] * 3
    for volume in volumes:
        cluster(forced).detach(volume)
    assert [forced.storage.digest(volume) for volume in volumes] == then


def test_a_revert_that_died_half_way_waits_for_a_volume_that_is_attached_now(own: Bench) -> None:
    volumes, group = [own.volume() for _ in range(3)], own.id()
    own.take(group, *volumes)
    then = [own.storage.digest(volume) for volume in volumes]
    for volume in volumes:
        own.storage.write(volume, 0, b"damage")
    half_done(own, group)
    cluster(own).attach(volumes[2], 2)
    own.gateway.start()
    wait(lambda: any(line["event"] == "revert is half done and waits" for line in own.gateway.log()))
    assert own.get(group).state == pb.GROUP_SNAPSHOT_STATE_REVERTING
    cluster(own).detach(volumes[2])
    assert own.settled(group).revert.state == DONE
    assert [own.storage.digest(volume) for volume in volumes] == then


def half_done(bench: Bench, group: str) -> None:
    """Begin a revert, and kill the gateway when the cluster has reverted one volume."""
    cluster(bench).forget_calls()
    cluster(bench).inject("VolumeRevert", "delay-after", delay_s=3)
    bench.stub.RevertGroupSnapshot(rpc.RevertGroupSnapshotRequest(id=group, no_safety=True))
    wait(lambda: cluster(bench).calls().get("VolumeRevert"))
    bench.gateway.kill()
    time.sleep(0.2)  # the call that is under way
    assert cluster(bench).calls()["VolumeRevert"] == 1


def test_a_gateway_killed_between_the_cut_and_the_record_settles_again(own: Bench) -> None:
    volumes, group = [own.volume() for _ in range(2)], own.id()
    before = [own.storage.digest(volume) for volume in volumes]
    cluster(own).forget_calls()
    cluster(own).inject("VolumeCreate", "delay", delay_s=3)
    own.cut(group, *volumes)
    wait(lambda: cluster(own).calls().get("VolumeCreate"))
    own.gateway.kill()
    own.gateway.start()
    settled = own.settled(group)
    assert settled.state == READY, settled
    assert [member.volume.volume for member in settled.members] == volumes
    assert [own.storage.member_digest(group, volume) for volume in volumes] == before


def test_what_a_crash_left_is_removed_when_the_journal_is_lost_too(own: Bench) -> None:
    volume, group, kept = own.volume(), own.id(), own.id()
    own.take(kept, volume)
    cluster(own).forget_calls()
    cluster(own).inject("VolumeCreate", "delay-after", delay_s=20)
    own.cut(group, volume)
    wait(lambda: cluster(own).calls().get("VolumeCreate"))
    outcome = lose_journal(own)
    assert (outcome["removed"], outcome["restored"]) == ([group], [kept])
    assert not own.storage.exists(group)


def test_long_ids_and_large_records_come_back_from_the_cluster(own: Bench) -> None:
    volume, group = own.volume(), "g" * 128
    own.groups.append(group)
    xml = f"<domain>{base64.b64encode(os.urandom(700_000)).decode()}</domain>"
    vm = pb.VmRecord(uuid=f"50000000-0000-0000-0000-{own.number:012d}", name="vm", domain_xml=xml)
    taken = own.take(group, volume, vm=vm, labels={f"k{number}": "ü" * 50 for number in range(60)})
    assert lose_journal(own)["restored"] == [group]
    again = own.get(group)
    assert (again.vm, again.labels, again.members) == (taken.vm, taken.labels, taken.members)
    assert own.storage.digest(volume) == own.storage.member_digest(group, volume)


def test_what_a_killed_gateway_left_attached_is_detached_and_what_others_have_open_is_not(own: Bench) -> None:
    volume, group, opened = own.volume(), own.id(), own.id()
    own.take(group, volume)
    own.take(opened, volume)
    names = [f"~{storpool(own).snapshots(one)[0].globalId}" for one in (group, opened)]
    for one in (group, opened):
        own.read(one, volume)
    assert [attachments(own, name) for name in names] == [[(CLIENT, "ro")]] * 2
    own.gateway.kill()
    assert [attachments(own, name) for name in names] == [[(CLIENT, "ro")]] * 2
    with (cluster(own).devices_by_id / names[1][1:]).open("rb"):
        own.gateway.start()
        own.take(own.id(), volume)
        assert [attachments(own, name) for name in names] == [[], [(CLIENT, "ro")]]
    own.delete(opened)
    assert attachments(own, names[1]) == []


def test_readers_share_an_attachment_that_ends_with_the_last(bench: Bench) -> None:
    volume, group = bench.volume(32 * MIB, data=os.urandom(32 * MIB)), bench.id()
    bench.take(group, volume)
    name = f"~{storpool(bench).snapshots(group)[0].globalId}"
    cluster(bench).forget_calls()
    request = rpc.ReadBlocksRequest(id=group, volume=bench.ref(volume))
    streams = [bench.stub.ReadBlocks(request) for _ in range(4)]
    for stream in streams:
        next(stream)
    assert attachments(bench, name) == [(CLIENT, "ro")]
    for stream in streams:
        stream.cancel()
    wait(lambda: attachments(bench, name) == [])


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


def test_a_volume_is_raw_and_of_the_pools_template(bench: Bench) -> None:
    volume = bench.volume(pool="small")
    assert TEMPLATE != "small"
    with refused("VOLUME_NOT_FOUND"):
        bench.stub.GetVolume(rpc.GetVolumeRequest(ref=bench.ref(volume, "main")))
    spec = bench.spec(("small", volume))
    spec.volumes[0].format = "qcow2"
    with refused("INVALID_ARGUMENT"):
        bench.stub.CreateGroupSnapshot(rpc.CreateGroupSnapshotRequest(id=bench.id(), spec=spec))
