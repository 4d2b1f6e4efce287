"""Attachments to StorPool's clients: who is in a revert's way, is detached for it, and what reading leaves."""

import os
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.conftest import Bench, refused
from tests.conformance.storages import MIB
from tests.conformance.storpool import Storpool, attachments, cluster, storpool
from tests.gateway_process import GatewayProcess, error_info
from tests.lab.storpool import CLIENT
from tests.waiting import wait

pytestmark = pytest.mark.parametrize("storage", ["storpool"], indirect=True)

READY = pb.GROUP_SNAPSHOT_STATE_READY
DONE = pb.Revert.STATE_DONE


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


def test_a_volume_that_was_resized_is_reverted_to_its_size(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    then = bench.storage.digest(volume)
    bench.take(group, volume)
    bench.storage.resize(volume, 9 * MIB)
    assert bench.revert(group).revert.state == DONE
    assert bench.storage.digest(volume) == then


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
