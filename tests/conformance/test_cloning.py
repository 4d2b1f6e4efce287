"""New volumes from members, where the pool can; where it cannot that is said before anything is done."""

import threading
import time

import grpc

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.conftest import CLONING, Bench, refused
from tests.conformance.storages import MIB
from tests.gateway_process import error_info


def clone(bench: Bench, group: str, *pairs: tuple[str, str]) -> rpc.CloneGroupSnapshotResponse:
    clones = [rpc.CloneSpec(source=bench.ref(volume), target_volume=target) for volume, target in pairs]
    for _, target in pairs:
        bench.volumes.append(("main", target))
    return bench.stub.CloneGroupSnapshot(rpc.CloneGroupSnapshotRequest(id=group, clones=clones), timeout=120)


def test_a_pool_that_cannot_clone_says_so(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    assert bench.capabilities().clone == bench.storage.clones_volumes
    if not bench.storage.clones_volumes:
        with refused("CAPABILITY_MISSING") as caught:
            clone(bench, group, (volume, f"c-{volume}"))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@CLONING
def test_a_clone_is_the_volume_as_it_was_and_lives_on_its_own(bench: Bench) -> None:
    volume, group = bench.volume(16 * MIB), bench.id()
    bench.storage.write(volume, 9 * MIB, b"far" * 1000)
    before = bench.storage.digest(volume)
    bench.take(group, volume)
    bench.storage.write(volume, 0, b"later")
    target = f"t{bench.number}-clone.raw"
    made = clone(bench, group, (volume, target)).volumes[0]
    assert (made.ref.volume, made.size_bytes, made.in_use) == (target, 16 * MIB, False)
    assert bench.storage.digest(target) == before
    bench.storage.write(target, 0, b"the clone's own")
    assert bench.storage.member_digest(group, volume) == before
    bench.storage.make_independent(target)
    bench.delete(group)
    assert bench.storage.digest(target) != before


@CLONING
def test_several_clones_of_several_members(bench: Bench) -> None:
    volumes, group = [bench.volume() for _ in range(3)], bench.id()
    bench.take(group, *volumes)
    pairs = [(volume, f"c-{volume}") for volume in volumes]
    made = clone(bench, group, *pairs)
    assert [volume.ref.volume for volume in made.volumes] == [target for _, target in pairs]
    for volume, target in pairs:
        assert bench.storage.digest(target) == bench.storage.digest(volume)
        bench.storage.make_independent(target)


@CLONING
def test_a_repeated_clone_returns_what_it_made(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    target = f"c-{volume}"
    first = clone(bench, group, (volume, target))
    bench.storage.write(target, 0, b"written since")
    written = bench.storage.digest(target)
    assert clone(bench, group, (volume, target)).volumes[0].ref == first.volumes[0].ref
    assert bench.storage.digest(target) == written
    bench.storage.make_independent(target)


@CLONING
def test_another_volume_is_never_overwritten(bench: Bench) -> None:
    volume, other, group = bench.volume(), bench.volume(), bench.id()
    before = bench.storage.digest(other)
    bench.take(group, volume)
    with refused("VOLUME_EXISTS") as caught:
        clone(bench, group, (volume, other))
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert error_info(caught.value).metadata["volume"] == other
    assert bench.storage.digest(other) == before


@CLONING
def test_a_snapshot_that_a_clone_needs_is_not_deleted(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    target = f"c-{volume}"
    clone(bench, group, (volume, target))
    content = bench.storage.digest(target)
    if bench.storage.is_dependent(target):
        with refused("SNAPSHOT_IN_USE") as caught:
            bench.delete(group)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert target in error_info(caught.value).metadata["clones"]
        assert bench.settled(group).state == pb.GROUP_SNAPSHOT_STATE_READY
        bench.storage.make_independent(target)
    bench.delete(group)
    assert bench.storage.digest(target) == content


@CLONING
def test_a_clone_goes_on_when_the_caller_goes_away(bench: Bench) -> None:
    volume, group = bench.volume(512 * MIB, data=b"c" * 300 * MIB), bench.id()
    bench.take(group, volume)
    target = f"c-{volume}"
    request = rpc.CloneGroupSnapshotRequest(
        id=group, clones=[rpc.CloneSpec(source=bench.ref(volume), target_volume=target)]
    )
    call = bench.stub.CloneGroupSnapshot.future(request)
    threading.Timer(0.2, call.cancel).start()
    time.sleep(0.4)
    clone(bench, group, (volume, target))
    assert bench.storage.digest(target) == bench.storage.digest(volume)
    bench.storage.make_independent(target)
