"""Cuts on StorPool: one call, whose answer may be lost; what is half done, late or forgotten."""

import base64
import os
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from tests.conformance.conftest import Bench, refused
from tests.conformance.storpool import cluster, snapshots, storpool
from tests.gateway_process import GatewayProcess
from tests.waiting import wait

pytestmark = pytest.mark.parametrize("storage", ["storpool"], indirect=True)

READY = pb.GROUP_SNAPSHOT_STATE_READY
DONE = pb.Revert.STATE_DONE
CUT = "VolumesGroupSnapshot"


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


def test_a_gateway_killed_between_the_cut_and_the_record_settles_again(own: Bench) -> None:
    volumes, group = [own.volume() for _ in range(2)], own.id()
    before = [own.storage.digest(volume) for volume in volumes]
    cluster(own).forget_calls()
    cluster(own).inject("VolumeCreate", "delay", delay_s=3)
    late = time.monotonic() + 4
    own.cut(group, *volumes)
    wait(lambda: cluster(own).calls().get("VolumeCreate"))
    own.gateway.kill()
    own.gateway.start()
    settled = own.settled(group)
    assert settled.state == READY, settled
    assert [member.volume.volume for member in settled.members] == volumes
    assert [own.storage.member_digest(group, volume) for volume in volumes] == before
    wait(lambda: time.monotonic() > late)  # the delayed call still comes, and must find the record there


def test_what_a_crash_left_is_removed_when_the_journal_is_lost_too(own: Bench) -> None:
    volume, group, kept = own.volume(), own.id(), own.id()
    own.take(kept, volume)
    cluster(own).forget_calls()
    cluster(own).inject("VolumeCreate", "delay-after", delay_s=20)
    own.cut(group, volume)
    wait(lambda: cluster(own).calls().get("VolumeCreate"))
    own.gateway.kill()
    outcome = own.gateway.rebuild_journal()
    own.gateway.start()
    assert (outcome["removed"], outcome["restored"]) == ([group], [kept])
    assert not own.storage.exists(group)


def test_long_ids_and_large_records_come_back_from_the_cluster(own: Bench) -> None:
    volume, group = own.volume(), "g" * 128
    own.groups.append(group)
    xml = f"<domain>{base64.b64encode(os.urandom(700_000)).decode()}</domain>"
    vm = pb.VmRecord(uuid=f"50000000-0000-0000-0000-{own.number:012d}", name="vm", domain_xml=xml)
    taken = own.take(group, volume, vm=vm, labels={f"k{number}": "ü" * 50 for number in range(60)})
    own.gateway.kill()
    assert own.gateway.rebuild_journal()["restored"] == [group]
    own.gateway.start()
    again = own.get(group)
    assert (again.vm, again.labels, again.members) == (taken.vm, taken.labels, taken.members)
    assert own.storage.digest(volume) == own.storage.member_digest(group, volume)
