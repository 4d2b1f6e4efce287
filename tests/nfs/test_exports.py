"""Exports that do not let root do everything, and exports that let nobody write."""

import os

import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.bench import Bench, refused
from tests.conformance.storages import MIB
from tests.nfs.conftest import NOBODY, OverNfs, wait

LIBVIRT_QEMU = 64055


def test_root_squashed_works_where_nobody_owns_the_directory(bench: Bench, storage: OverNfs) -> None:
    volume, group = bench.volume(pool="squashed"), bench.id()
    os.chown(storage.root("squashed") / volume, NOBODY, NOBODY)
    before = storage.digest(volume, "squashed")
    bench.take(group, ("squashed", volume))
    assert storage.member(group, volume, "squashed").stat().st_uid == NOBODY
    storage.write(volume, 0, b"damage", "squashed")
    assert bench.revert(group).revert.state == pb.Revert.STATE_DONE
    assert storage.digest(volume, "squashed") == before
    assert bench.read(group, volume, 0, MIB, "squashed") == storage.member(group, volume, "squashed").read_bytes()[:MIB]


@pytest.mark.expects_log("undone")
def test_a_squashed_root_cannot_snapshot_what_it_cannot_read_and_says_why(bench: Bench, storage: OverNfs) -> None:
    volume, group = bench.volume(pool="squashed"), bench.id()
    path = storage.root("squashed") / volume
    os.chown(path, LIBVIRT_QEMU, LIBVIRT_QEMU)
    path.chmod(0o600)
    with refused("POOL_UNAVAILABLE") as caught:
        bench.prepare(group, ("squashed", volume))
    assert "no_root_squash" in caught.value.details()
    assert volume in caught.value.details()
    assert storage.leftovers("squashed") == []


@pytest.mark.expects_log("revert failed, nothing was changed")
def test_a_squashed_root_cannot_give_a_volume_back_to_its_owner_and_changes_nothing(
    bench: Bench, storage: OverNfs
) -> None:
    volume, group = bench.volume(pool="squashed"), bench.id()
    path = storage.root("squashed") / volume
    os.chown(path, LIBVIRT_QEMU, LIBVIRT_QEMU)
    bench.take(group, ("squashed", volume))
    storage.write(volume, 0, b"damage", "squashed")
    damaged, inode = storage.digest(volume, "squashed"), path.stat().st_ino
    outcome = bench.revert(group).revert
    assert outcome.state == pb.Revert.STATE_FAILED
    assert "no_root_squash" in outcome.failure.message
    assert (storage.digest(volume, "squashed"), path.stat().st_ino) == (damaged, inode)
    assert sorted(entry.name for entry in storage.member(group, volume, "squashed").parent.iterdir()) == [
        ".manifest.json",
        volume,
    ]


@pytest.mark.expects_log("undone")
def test_a_directory_of_roots_is_refused_to_a_squashed_root(bench: Bench, storage: OverNfs) -> None:
    volume = bench.volume(pool="roots")
    wait(lambda: "no_root_squash" in bench.pool("roots").health.message, every_s=0.2)
    with refused("POOL_UNAVAILABLE") as caught:
        bench.prepare(bench.id(), ("roots", volume))
    assert "no_root_squash" in caught.value.details()
    assert storage.leftovers("roots") == []


@pytest.mark.expects_log("undone")
def test_an_export_that_is_read_only_is_said_to_be(bench: Bench, storage: OverNfs) -> None:
    volume = bench.volume(pool="readonly")
    listed = bench.stub.ListVolumes(rpc.ListVolumesRequest(pool="readonly")).volumes
    assert [found.ref.volume for found in listed] == [volume]
    with refused("POOL_UNAVAILABLE") as caught:
        bench.prepare(bench.id(), ("readonly", volume))
    assert "Read-only file system" in caught.value.details()
    assert "writable" in caught.value.details()
    assert storage.leftovers("readonly") == []
