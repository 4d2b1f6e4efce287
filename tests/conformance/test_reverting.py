"""Reverting: all the named volumes or none, the state before kept, and every revert can be undone."""

import os
from pathlib import Path

import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from tests.conformance.conftest import FILES, Bench, refused
from tests.conformance.storages import MIB
from tests.gateway_process import error_info

DONE = pb.Revert.STATE_DONE


def test_a_reverted_volume_is_byte_equal_to_the_snapshot_and_the_safety_to_what_was_there(bench: Bench) -> None:
    first, second, group = bench.volume(), bench.volume(), bench.id()
    bench.take(group, first, second)
    then = [bench.storage.digest(volume) for volume in (first, second)]
    bench.storage.write(first, 100, b"damage")
    bench.storage.write(second, MIB, b"more damage")
    damaged = [bench.storage.digest(volume) for volume in (first, second)]
    outcome = bench.revert(group)
    assert outcome.revert.state == DONE
    assert [bench.storage.digest(volume) for volume in (first, second)] == then
    safety = outcome.revert.safety_id
    assert [bench.storage.member_digest(safety, volume) for volume in (first, second)] == damaged
    assert [bench.storage.member_digest(group, volume) for volume in (first, second)] == then


def test_a_wrong_revert_is_undone_by_its_safety(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    bench.storage.write(volume, 0, b"the work of a day")
    before = bench.storage.digest(volume)
    safety = bench.revert(group).revert.safety_id
    assert bench.storage.digest(volume) != before
    bench.revert(safety)
    assert bench.storage.digest(volume) == before


def test_only_the_named_members_are_reverted(bench: Bench) -> None:
    first, second, group = bench.volume(), bench.volume(), bench.id()
    bench.take(group, first, second)
    then = bench.storage.digest(first)
    for volume in (first, second):
        bench.storage.write(volume, 0, b"changed")
    changed = bench.storage.digest(second)
    bench.revert(group, first)
    assert bench.storage.digest(first) == then
    assert bench.storage.digest(second) == changed


def test_writes_after_a_revert_do_not_touch_the_snapshot(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    content = bench.storage.member_digest(group, volume)
    bench.revert(group)
    bench.storage.write(volume, 0, b"after the revert")
    assert bench.storage.member_digest(group, volume) == content


def test_a_lost_volume_comes_back(bench: Bench) -> None:
    volume, kept, group = bench.volume(), bench.volume(), bench.id()
    bench.take(group, volume, kept)
    then = bench.storage.digest(volume)
    bench.storage.remove(volume)
    outcome = bench.revert(group, volume, no_safety=True)
    assert outcome.revert.state == DONE
    assert bench.storage.digest(volume) == then


def test_without_safety_nothing_is_kept(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    outcome = bench.revert(group, no_safety=True)
    assert outcome.revert.state == DONE
    assert outcome.revert.safety_id == ""
    assert [found.id for found in bench.list(volume=bench.ref(volume))] == [group]


def test_a_volume_in_use_is_not_reverted_and_its_user_is_named(bench: Bench) -> None:
    idle, volume, group = bench.volume(), bench.volume(), bench.id()
    bench.take(group, idle, volume)
    bench.storage.write(idle, 0, b"changed")
    before = bench.storage.digest(idle)
    with bench.storage.in_use(volume) as user:
        with refused("VOLUME_IN_USE") as caught:
            bench.revert(group)
        assert user in error_info(caught.value).metadata["users"]
    assert bench.storage.digest(idle) == before
    assert bench.get(group).state == pb.GROUP_SNAPSHOT_STATE_READY


def test_a_repeat_with_the_same_safety_is_the_same_revert(bench: Bench) -> None:
    volume, group, safety = bench.volume(), bench.id(), bench.id("safety")
    bench.take(group, volume)
    first = bench.revert(group, safety_id=safety)
    bench.storage.write(volume, 0, b"written after the revert")
    before = bench.storage.digest(volume)
    again = bench.revert(group, safety_id=safety)
    assert again.revert.begin_time == first.revert.begin_time
    assert bench.storage.digest(volume) == before


def test_the_safety_may_not_be_another_snapshot(bench: Bench) -> None:
    volume, group, other = bench.volume(), bench.id(), bench.id()
    bench.take(group, volume)
    bench.take(other, volume)
    with refused("GROUP_SNAPSHOT_EXISTS"):
        bench.revert(group, safety_id=other)


@FILES
def test_owner_and_mode_of_the_volume_are_kept(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    path = Path(bench.storage.source(volume)["file"])
    path.chmod(0o640)
    os.chown(path, 1234, 4321)
    os.setxattr(path, "user.note", b"kept")
    bench.take(group, volume)
    path.chmod(0o604)
    bench.revert(group)
    status = path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1234, 4321, 0o604)
    assert os.getxattr(path, "user.note") == b"kept"


def test_what_is_no_member_cannot_be_reverted(bench: Bench) -> None:
    volume, other, group = bench.volume(), bench.volume(), bench.id()
    bench.take(group, volume)
    with refused("MEMBER_NOT_FOUND"):
        bench.revert(group, other)


def test_only_a_ready_and_confirmed_snapshot_is_reverted_to(bench: Bench) -> None:
    volume, group, provisional = bench.volume(), bench.id(), bench.id()
    bench.prepare(group, volume)
    with refused("STATE_INVALID"):
        bench.revert(group)
    bench.cut(provisional, volume, confirm_s=30)
    bench.settled(provisional)
    with refused("STATE_INVALID"):
        bench.revert(provisional)


@pytest.mark.expects_log("revert failed, nothing was changed")
@pytest.mark.expects_log("group snapshot failed")
def test_a_revert_without_room_changes_nothing(bench: Bench) -> None:
    volume, group = bench.volume(16 * MIB, "small", data=b"y" * 16 * MIB), bench.id()
    bench.take(group, ("small", volume))
    bench.storage.write(volume, 0, b"present", "small")
    present = bench.storage.digest(volume, "small")
    with bench.storage.full():
        outcome = bench.revert(group)
    if outcome.revert.state == pb.Revert.STATE_FAILED:
        assert outcome.revert.failure.reason == "POOL_FULL"
        assert bench.storage.digest(volume, "small") == present
        bench.wait_gone(outcome.revert.safety_id)
    else:
        assert bench.storage.clones
        assert bench.storage.digest(volume, "small") == bench.storage.member_digest(group, volume, "small")
    assert outcome.state == pb.GROUP_SNAPSHOT_STATE_READY


def test_the_tree_of_a_vm_follows_takes_reverts_and_deletions(bench: Bench) -> None:
    volume = bench.volume()
    vm = pb.VmRecord(uuid=f"00000000-0000-0000-0000-{bench.number:012d}", name="tree")
    first, second, third = (bench.id() for _ in range(3))
    bench.take(first, volume, vm=vm)
    bench.take(second, volume, vm=vm)
    assert _tree(bench, vm.uuid) == {first: ("", False), second: (first, True)}
    bench.revert(first, no_safety=True)
    bench.take(third, volume, vm=vm)
    assert _tree(bench, vm.uuid) == {first: ("", False), second: (first, False), third: (first, True)}
    bench.delete(first)
    assert _tree(bench, vm.uuid) == {second: ("", False), third: ("", True)}
    bench.delete(third)
    assert _tree(bench, vm.uuid) == {second: ("", False)}


def _tree(bench: Bench, uuid: str) -> dict[str, tuple[str, bool]]:
    return {found.id: (found.vm.parent_id, found.vm.current) for found in bench.list(vm_uuid=uuid)}


def test_an_instant_revert_where_the_pool_can(bench: Bench) -> None:
    volume, group, older = bench.volume(16 * MIB), bench.id(), bench.id()
    bench.take(older, volume)
    bench.storage.write(volume, 0, b"between")
    bench.take(group, volume)
    then, first = bench.storage.digest(volume), bench.storage.member_digest(older, volume)
    bench.storage.write(volume, 5 * MIB, b"damage")
    damaged = bench.storage.digest(volume)
    if not bench.capabilities().instant_revert:
        with refused("CAPABILITY_MISSING"):
            bench.revert(group, instant=True)
        assert bench.storage.digest(volume) == damaged
        return
    outcome = bench.revert(group, instant=True)
    assert outcome.revert.state == DONE, outcome.revert
    assert outcome.revert.instant
    assert bench.storage.digest(volume) == then
    assert bench.storage.member_digest(outcome.revert.safety_id, volume) == damaged
    assert bench.storage.member_digest(older, volume) == first
    bench.storage.write(volume, 0, b"after")
    assert bench.storage.member_digest(group, volume) == then
    again = bench.revert(older, no_safety=True)
    assert again.revert.state == DONE
    assert bench.storage.digest(volume) == first
    bench.take(bench.id(), volume)
    bench.storage.make_independent(volume)


def test_an_instant_revert_can_be_undone_by_another(bench: Bench) -> None:
    volume, group = bench.volume(16 * MIB), bench.id()
    bench.take(group, volume)
    then = bench.storage.digest(volume)
    bench.storage.write(volume, 5 * MIB, b"the work of a day")
    worked = bench.storage.digest(volume)
    if not bench.capabilities().instant_revert:
        with refused("CAPABILITY_MISSING"):
            bench.revert(group, instant=True)
        return
    safety = bench.revert(group, instant=True).revert.safety_id
    assert bench.storage.digest(volume) == then
    bench.revert(safety, instant=True)
    assert bench.storage.digest(volume) == worked
    bench.storage.make_independent(volume)
