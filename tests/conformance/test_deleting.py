"""Deleting: idempotent, complete, in every state."""

from concurrent.futures import ThreadPoolExecutor

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.conftest import Bench, refused
from tests.conformance.storages import MIB


def test_deleting_a_missing_id_is_ok(bench: Bench) -> None:
    response = bench.stub.DeleteGroupSnapshot(rpc.DeleteGroupSnapshotRequest(id="never-was"))
    assert not response.HasField("group_snapshot")


def test_deleting_leaves_nothing_and_may_be_repeated(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    before = bench.storage.digest(volume)
    bench.take(group, volume)
    bench.delete(group)
    bench.delete(group)
    assert not bench.storage.exists(group)
    assert bench.storage.digest(volume) == before
    with refused("GROUP_SNAPSHOT_NOT_FOUND"):
        bench.get(group)


def test_a_reservation_is_deleted(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.prepare(group, volume)
    bench.delete(group)
    assert not bench.storage.exists(group)


def test_a_snapshot_is_deleted_while_it_settles(bench: Bench) -> None:
    volume, group = bench.volume(256 * MIB, data=b"z" * 128 * MIB), bench.id()
    bench.cut(group, volume)
    bench.delete(group)
    assert not bench.storage.exists(group)
    bench.take(bench.id(), volume)


def test_an_id_can_be_used_again_after_its_deletion(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    bench.delete(group)
    bench.storage.write(volume, 0, b"new content")
    bench.take(group, volume)
    assert bench.storage.member_digest(group, volume) == bench.storage.digest(volume)


def test_deleting_one_snapshot_leaves_the_others(bench: Bench) -> None:
    volume, gone, kept = bench.volume(), bench.id(), bench.id()
    bench.take(gone, volume)
    content = bench.storage.digest(volume)
    bench.take(kept, volume)
    bench.delete(gone)
    assert bench.storage.member_digest(kept, volume) == content


def test_concurrent_deletions_of_one_id_are_one(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    request = rpc.DeleteGroupSnapshotRequest(id=group)
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda _: bench.stub.DeleteGroupSnapshot(request), range(8)))
    bench.wait_gone(group)


def test_a_watch_ends_when_the_snapshot_is_gone(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.prepare(group, volume)
    with ThreadPoolExecutor(1) as watcher:
        watching = watcher.submit(bench.watch, group)
        bench.delete(group)
        assert watching.result(20)[-1].state in (pb.GROUP_SNAPSHOT_STATE_PREPARED, pb.GROUP_SNAPSHOT_STATE_DELETING)
