"""Restarts and crashes of the gateway: what was promised is there, what was not is gone."""

import time

import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.conftest import Bench
from tests.conformance.storages import MIB

READY = pb.GROUP_SNAPSHOT_STATE_READY


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_the_state_after_a_restart_is_the_state_before(own: Bench, how: str) -> None:
    volume = own.volume()
    vm = pb.VmRecord(uuid=f"20000000-0000-0000-0000-{own.number:012d}", name="vm", domain_xml="<domain/>")
    for word in ("a", "b"):
        own.take(own.id(word), volume, labels={"l": word}, vm=vm)
    own.revert(own.groups[0])
    before = own.list()
    if how == "stop":
        assert own.gateway.stop() == 0
    else:
        own.gateway.kill()
    own.gateway.start()
    assert own.list() == before
    assert own.storage.member_digest(own.groups[0], volume) == own.storage.digest(volume)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_reservation_does_not_outlive_the_gateway(own: Bench, how: str) -> None:
    volume, group = own.volume(), own.id()
    own.prepare(group, volume)
    getattr(own.gateway, how)()
    own.gateway.start()
    own.wait_gone(group)
    assert not own.storage.exists(group)


def test_an_unconfirmed_snapshot_does_not_outlive_the_gateway(own: Bench) -> None:
    volume, group = own.volume(), own.id()
    own.cut(group, volume, confirm_s=60)
    own.gateway.kill()
    own.gateway.start()
    own.wait_gone(group)
    assert not own.storage.exists(group)


def test_a_gateway_killed_while_settling_ends_with_the_whole_snapshot(own: Bench) -> None:
    volume, group = own.volume(512 * MIB, data=b"q" * 400 * MIB), own.id()
    before = own.storage.digest(volume)
    own.cut(group, volume)
    own.gateway.kill()
    own.gateway.start()
    assert own.settled(group).state == READY
    assert own.storage.member_digest(group, volume) == before


def test_a_volume_written_while_the_gateway_was_dead_is_no_ready_snapshot(own: Bench) -> None:
    volume, group = own.volume(512 * MIB, data=b"q" * 400 * MIB), own.id()
    before = own.storage.digest(volume)
    own.cut(group, volume)
    own.gateway.kill()
    own.storage.write(volume, 300 * MIB, b"meanwhile")
    own.gateway.start()
    outcome = own.settled(group)
    if outcome.state == READY:
        assert own.storage.member_digest(group, volume) == before
    else:
        assert not own.storage.clones
        assert outcome.failure.reason == "VOLUME_CHANGED"
        assert not own.storage.exists(group)


def test_a_gateway_killed_while_reverting_finishes_it(own: Bench) -> None:
    volumes = [own.volume(128 * MIB, data=b"r" * 100 * MIB) for _ in range(3)]
    group, safety = own.id(), own.id("safety")
    own.take(group, *volumes)
    then = [own.storage.digest(volume) for volume in volumes]
    for volume in volumes:
        own.storage.write(volume, 0, b"damage")
    damaged = [own.storage.digest(volume) for volume in volumes]
    own.stub.RevertGroupSnapshot(rpc.RevertGroupSnapshotRequest(id=group, safety_id=safety))
    time.sleep(0.05)
    own.gateway.kill()
    own.gateway.start()
    outcome = own.settled(group)
    assert outcome.revert.state == pb.Revert.STATE_DONE, outcome.revert
    assert [own.storage.digest(volume) for volume in volumes] == then
    assert [own.storage.member_digest(safety, volume) for volume in volumes] == damaged


def test_a_gateway_killed_while_deleting_finishes_it(own: Bench) -> None:
    volumes = [own.volume(MIB) for _ in range(32)]
    group = own.id()
    own.take(group, *volumes)
    own.stub.DeleteGroupSnapshot(rpc.DeleteGroupSnapshotRequest(id=group))
    own.gateway.kill()
    own.gateway.start()
    own.wait_gone(group)
    assert not own.storage.exists(group)


def test_a_lost_journal_is_rebuilt_from_the_storage(own: Bench) -> None:
    volume, other, lost = own.volume(), own.volume(pool="other"), own.id("lost")
    vm = pb.VmRecord(uuid=f"30000000-0000-0000-0000-{own.number:012d}", name="vm")
    kept = own.id()
    own.take(kept, volume, ("other", other), labels={"kept": "yes"}, vm=vm)
    own.take(own.id(), volume, vm=vm)
    own.take(lost, volume, ("other", other))
    time.sleep(0.5)  # what an older record says of the tree is corrected in the background
    before = {found.id: found for found in own.list()}
    own.gateway.stop()
    own.storage.damage(lost, "other")
    assert own.gateway.rebuild_journal()["incomplete"] == [lost]
    own.gateway.start()
    after = {found.id: found for found in own.list()}
    assert after.pop(lost).state == pb.GROUP_SNAPSHOT_STATE_FAILED
    del before[lost]
    for found in (*after.values(), *before.values()):
        assert found.HasField("ready_time")
        found.ClearField("ready_time")  # the record is written just before
    assert after == before
    again = own.gateway.cli("reconcile", "--config", own.gateway.config)
    assert again.returncode == 1
    assert "another gateway is using this journal" in again.stderr


def test_a_second_gateway_on_the_same_journal_refuses(own: Bench) -> None:
    second = own.gateway.cli("serve", "--config", own.gateway.config)
    assert second.returncode == 1
    assert "another gateway is using this journal" in second.stderr
    own.take(own.id(), own.volume())
