"""Taking group snapshots: all members or none, one instant, and every call repeatable."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.conftest import Bench, refused
from tests.conformance.storages import MIB
from tests.gateway_process import GatewayProcess, error_info, reason_of

CRASH, FILESYSTEM = pb.CONSISTENCY_CRASH, pb.CONSISTENCY_FILESYSTEM
UUID = "11111111-2222-3333-4444-555555555555"


def test_a_snapshot_is_byte_equal_to_the_volume_at_the_cut(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    before = bench.storage.digest(volume)
    bench.take(group, volume)
    bench.storage.write(volume, 0, b"written after the cut")
    assert bench.storage.member_digest(group, volume) == before != bench.storage.digest(volume)


def test_members_share_one_instant_under_writers_that_are_quiesced(bench: Bench) -> None:
    volumes = [bench.volume() for _ in range(4)]
    group, stop, hold, held = bench.id(), threading.Event(), threading.Event(), threading.Event()
    under_way = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            if hold.is_set():
                held.set()
                time.sleep(0.001)
                continue
            number += 1
            for volume in volumes:
                bench.storage.write(volume, 0, b"%020d" % number)
            if number > 1:
                under_way.set()

    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(write)
        try:
            bench.prepare(group, *volumes)
            assert under_way.wait(60)
            hold.set()
            assert held.wait(60)
            bench.cut(group)
            if bench.storage.clones:
                hold.clear()  # the copies of other storages would see the writes and fail, as they should
            time.sleep(0.2)
            bench.settled(group)
        finally:
            hold.clear()
            stop.set()
        writing.result()
    counters = {bench.read(group, volume, 0, 20) for volume in volumes}
    assert len(counters) == 1
    assert int(counters.pop()) > 1


@pytest.mark.expects_log("group snapshot failed")
def test_writes_that_go_on_during_a_copy_are_never_a_ready_snapshot(bench: Bench) -> None:
    volume, group = bench.volume(64 * MIB), bench.id()
    before = bench.storage.digest(volume)
    bench.prepare(group, volume)
    bench.cut(group)
    bench.storage.write(volume, 32 * MIB, b"too early")
    outcome = bench.settled(group)
    if outcome.state == pb.GROUP_SNAPSHOT_STATE_READY:
        assert bench.storage.member_digest(group, volume) == before
    else:
        assert not bench.storage.clones
        assert outcome.failure.reason == "VOLUME_CHANGED"


def test_none_when_one_volume_is_missing(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    with refused("VOLUME_NOT_FOUND") as caught:
        bench.cut(group, volume, "not-there.raw")
    assert error_info(caught.value).metadata["volume"] == "not-there.raw"
    assert error_info(caught.value).metadata["pool"] == "main"
    assert bench.gone(group)
    assert not bench.storage.exists(group)


def test_none_when_a_volume_in_another_pool_is_missing(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    with refused("VOLUME_NOT_FOUND"):
        bench.cut(group, volume, ("other", "not-there.raw"))
    assert bench.gone(group)
    assert not bench.storage.exists(group)


def test_none_when_a_volume_goes_between_prepare_and_cut(bench: Bench) -> None:
    stays, goes, group = bench.volume(), bench.volume(), bench.id()
    bench.prepare(group, stays, goes)
    bench.storage.remove(goes)
    with refused("VOLUME_NOT_FOUND"):
        bench.cut(group)
    assert bench.gone(group)
    assert not bench.storage.exists(group)


def test_none_when_a_volume_is_replaced_between_prepare_and_cut(bench: Bench) -> None:
    stays, other, group = bench.volume(), bench.volume(), bench.id()
    bench.prepare(group, stays, other)
    bench.storage.replace(other)
    with refused("VOLUME_CHANGED"):
        bench.cut(group)
    assert bench.gone(group)
    assert not bench.storage.exists(group)


def test_none_when_a_volume_is_resized_between_prepare_and_cut(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.prepare(group, volume)
    bench.storage.resize(volume, 8 * MIB)
    with refused("VOLUME_CHANGED"):
        bench.cut(group)
    assert bench.gone(group)


def test_none_when_the_disk_is_full(bench: Bench) -> None:
    volume, group = bench.volume(16 * MIB, "small", data=b"x" * 16 * MIB), bench.id()
    before = bench.storage.digest(volume, "small")
    with bench.storage.full():
        try:
            bench.cut(group, ("small", volume))
        except grpc.RpcError as error:
            assert reason_of(error) == "POOL_FULL"  # noqa: PT017 - a clone may still find room
            assert bench.gone(group)
            assert not bench.storage.exists(group, "small")
        else:
            assert bench.storage.clones
            assert bench.settled(group).state == pb.GROUP_SNAPSHOT_STATE_READY
            assert bench.storage.member_digest(group, volume, "small") == before
    assert bench.storage.digest(volume, "small") == before


def test_a_volume_in_use_is_cut_at_once_or_refused_by_name(bench: Bench) -> None:
    volume, idle, group = bench.volume(), bench.volume(), bench.id()
    with bench.storage.in_use(volume):
        if bench.storage.clones:
            before = bench.storage.digest(volume)
            bench.take(group, idle, volume)
            assert bench.storage.member_digest(group, volume) == before
            return
        with refused("VOLUME_IN_USE") as caught:
            bench.prepare(group, idle, volume)
        assert error_info(caught.value).metadata["volume"] == volume
        assert "qemu-storage-daemon" in caught.value.details()
        assert bench.gone(group)


def test_a_volume_in_use_may_be_copied_inside_the_cut_when_allowed(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    before = bench.storage.digest(volume)
    with bench.storage.in_use(volume):
        bench.take(group, volume, allow_copy=True)
    assert bench.storage.member_digest(group, volume) == before


def test_a_repeat_returns_the_same_and_cuts_nothing(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    first = bench.take(group, volume)
    content = bench.storage.member_digest(group, volume)
    bench.storage.write(volume, 0, b"later")
    assert bench.cut(group, volume).cut_time == first.cut_time
    assert bench.cut(group).cut_time == first.cut_time
    assert bench.storage.member_digest(group, volume) == content


@pytest.mark.parametrize("other", ["volumes", "labels", "options", "vm", "order"])
def test_a_repeat_with_other_arguments_is_refused(bench: Bench, other: str) -> None:
    first, second, group = bench.volume(), bench.volume(), bench.id()
    bench.take(group, first, second)
    with refused("GROUP_SNAPSHOT_EXISTS") as caught:
        if other == "volumes":
            bench.cut(group, first)
        elif other == "labels":
            bench.cut(group, first, second, labels={"a": "b"})
        elif other == "options":
            bench.cut(group, first, second, allow_copy=True)
        elif other == "vm":
            bench.cut(group, first, second, vm=pb.VmRecord(uuid=UUID, name="x"))
        else:
            bench.cut(group, second, first)
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    with refused("GROUP_SNAPSHOT_EXISTS"):
        bench.prepare(group, first)


def test_concurrent_creates_with_one_id_make_one_snapshot(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    with ThreadPoolExecutor(16) as callers:
        cuts = list(callers.map(lambda _: bench.cut(group, volume), range(16)))
    assert len({cut.cut_time.ToNanoseconds() for cut in cuts}) == 1
    assert [found.id for found in bench.list() if found.id == group] == [group]


def test_concurrent_creates_with_different_ids_all_succeed(bench: Bench) -> None:
    volume = bench.volume()
    groups = [bench.id() for _ in range(8)]
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda group: bench.cut(group, volume), groups))
    assert {bench.settled(group).state for group in groups} == {pb.GROUP_SNAPSHOT_STATE_READY}


def test_prepare_changes_no_volume_and_shows_its_expiry(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    before = bench.storage.digest(volume)
    prepared = bench.prepare(group, volume)
    assert prepared.state == pb.GROUP_SNAPSHOT_STATE_PREPARED
    assert 55 < prepared.expire_time.seconds - prepared.create_time.seconds < 65
    assert not prepared.HasField("cut_time")
    assert prepared.members[0].size_bytes == 4 * MIB
    assert bench.prepare(group, volume) == prepared
    assert bench.storage.digest(volume) == before


def test_the_cut_is_of_the_present_not_of_the_preparation(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.prepare(group, volume)
    bench.storage.write(volume, MIB, b"between prepare and cut")
    now = bench.storage.digest(volume)
    bench.cut(group)
    bench.settled(group)
    assert bench.storage.member_digest(group, volume) == now


def test_a_reservation_expires_and_leaves_nothing(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    request = rpc.PrepareGroupSnapshotRequest(id=group, spec=bench.spec(volume))
    request.expire_after.FromSeconds(1)
    bench.stub.PrepareGroupSnapshot(request)
    bench.wait_gone(group, 5)
    assert not bench.storage.exists(group)
    with refused("INVALID_ARGUMENT"):
        bench.cut(group)


def test_an_unconfirmed_snapshot_is_deleted(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    assert bench.cut(group, volume, confirm_s=1).HasField("expire_time")
    bench.wait_gone(group, 6)
    assert not bench.storage.exists(group)


def test_a_confirmed_snapshot_stays_with_what_was_verified(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    assert bench.cut(group, volume, confirm_s=2).consistency == CRASH
    request = rpc.ConfirmGroupSnapshotRequest(id=group, consistency=FILESYSTEM)
    assert not bench.stub.ConfirmGroupSnapshot(request).group_snapshot.HasField("expire_time")
    time.sleep(2.5)
    bench.stub.ConfirmGroupSnapshot(request)
    assert bench.get(group).consistency == FILESYSTEM


def test_a_reservation_cannot_be_confirmed(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.prepare(group, volume)
    with refused("STATE_INVALID"):
        bench.stub.ConfirmGroupSnapshot(rpc.ConfirmGroupSnapshotRequest(id=group, consistency=FILESYSTEM))


def test_watching_ends_with_ready_and_begins_with_the_present(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.cut(group, volume)
    states = [seen.state for seen in bench.watch(group)]
    assert states[-1] == pb.GROUP_SNAPSHOT_STATE_READY
    assert set(states) <= {pb.GROUP_SNAPSHOT_STATE_COPYING, pb.GROUP_SNAPSHOT_STATE_READY}
    assert [seen.state for seen in bench.watch(group)] == [pb.GROUP_SNAPSHOT_STATE_READY]


def test_copying_reports_its_progress(bench: Bench) -> None:
    volume, group = bench.volume(512 * MIB, data=b"p" * 384 * MIB), bench.id()
    bench.cut(group, volume)
    seen = bench.watch(group)
    assert seen[-1].state == pb.GROUP_SNAPSHOT_STATE_READY
    if not bench.storage.clones:
        copying = [snapshot.progress for snapshot in seen if snapshot.state == pb.GROUP_SNAPSHOT_STATE_COPYING]
        assert any(progress.total_bytes >= 384 * MIB for progress in copying)


def test_holes_stay_holes(bench: Bench) -> None:
    volume, group = bench.volume(512 * MIB), bench.id()
    bench.storage.write(volume, 200 * MIB, b"island" * 100)
    bench.take(group, volume)
    allocated = bench.storage.member_ranges(group, volume)
    assert sum(length for _, length in allocated) < MIB
    assert any(offset <= 200 * MIB < offset + length for offset, length in allocated)
    bench.revert(group, no_safety=True)
    assert sum(length for _, length in bench.storage.ranges(volume)) < MIB


def test_a_group_spans_pools(bench: Bench) -> None:
    here, there, group = bench.volume(), bench.volume(pool="other"), bench.id()
    taken = bench.take(group, here, ("other", there))
    assert [(member.volume.pool, member.volume.volume) for member in taken.members] == [
        ("main", here),
        ("other", there),
    ]
    assert bench.storage.member_digest(group, there, "other") == bench.storage.digest(there, "other")


def test_a_group_of_many_volumes(bench: Bench) -> None:
    volumes = [bench.volume(MIB) for _ in range(32)]
    group = bench.id()
    assert [member.volume.volume for member in bench.take(group, *volumes).members] == volumes
    assert all(bench.storage.member_digest(group, v) == bench.storage.digest(v) for v in volumes[::8])


def test_labels_and_vm_are_kept(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    vm = pb.VmRecord(uuid=UUID.replace("1", "7"), name="wéb", domain_xml="<domain/>")
    taken = bench.take(group, volume, labels={"why": "tést"}, vm=vm)
    assert dict(taken.labels) == {"why": "tést"}
    assert (taken.vm.name, taken.vm.domain_xml, taken.vm.current) == ("wéb", "<domain/>", True)


def test_what_a_later_release_brings_is_refused_and_said(bench: Bench) -> None:
    volume = bench.volume()
    with refused("CAPABILITY_MISSING") as caught:
        bench.cut(bench.id(), volume, memory=True)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_two_gateways_of_one_pool_never_mix_their_groups(bench: Bench, tmp_path: Path) -> None:
    """An id that the storage knows but the journal does not is refused, and stays untouched."""
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    content = bench.storage.member_digest(group, volume)
    with GatewayProcess(tmp_path / "second", bench.storage.pools()) as second:
        request = rpc.CreateGroupSnapshotRequest(id=group, spec=bench.spec(volume))
        with pytest.raises(grpc.RpcError) as caught:
            second.stub.CreateGroupSnapshot(request)
        assert reason_of(caught.value) == "GROUP_SNAPSHOT_EXISTS"
    assert bench.storage.member_digest(group, volume) == content
