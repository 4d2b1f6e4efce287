"""Clones as files: names that mean a format, whose volume it is, owners, crashes and a full pool."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.conftest import EXT4, FILES, XFS, Bench, refused
from tests.conformance.storages import MIB, Directory
from tests.gateway_process import error_info
from tests.lab.disk import allocated_ranges, sha256


def root_of(bench: Bench, pool: str = "main") -> Path:
    assert isinstance(bench.storage, Directory)
    return bench.storage.root(pool)


def clone(bench: Bench, group: str, volume: str, target: str, pool: str = "main") -> None:
    spec = rpc.CloneSpec(source=bench.ref(volume, pool), target_volume=target)
    bench.volumes.append((pool, target))
    bench.stub.CloneGroupSnapshot(rpc.CloneGroupSnapshotRequest(id=group, clones=[spec]), timeout=120)


def left_in_group(bench: Bench, group: str, pool: str = "main") -> set[str]:
    return set(os.listdir(root_of(bench, pool) / ".frostgate" / group))


@XFS
@pytest.mark.parametrize(("image_format", "target"), [("raw", "new.qcow2"), ("qcow2", "new.raw"), ("qcow2", "new")])
def test_a_name_that_means_another_format_is_refused(bench: Bench, image_format: str, target: str) -> None:
    volume, group = bench.volume(image_format=image_format), bench.id()
    bench.take(group, volume)
    with refused("INVALID_ARGUMENT") as caught:
        clone(bench, group, volume, target)
    assert error_info(caught.value).metadata["volume"] == target
    assert f"new.{image_format}" in caught.value.details()
    assert not (root_of(bench) / target).exists()


@FILES
def test_another_file_that_took_the_clone_s_name_is_not_taken_for_it(bench: Bench) -> None:
    """Not even where the file system gives it the inode of the one that was deleted."""
    volume, group, target = bench.volume(), bench.id(), f"t{bench.number}-clone.raw"
    bench.take(group, volume)
    clone(bench, group, volume, target)
    path = root_of(bench) / target
    inode = path.stat().st_ino
    others = []
    for number in range(200):
        path.unlink(missing_ok=True)
        path.write_bytes(b"somebody's own")
        if path.stat().st_ino == inode:
            break
        others.append(path.rename(path.with_name(f".other-{number}")))
    for other in others:
        other.unlink()
    path.write_bytes(b"somebody's own")
    with refused("VOLUME_EXISTS"):
        clone(bench, group, volume, target)
    assert path.read_bytes() == b"somebody's own"


@FILES
def test_a_clone_of_another_member_is_another_volume(bench: Bench) -> None:
    volumes, group, target = [bench.volume(), bench.volume()], bench.id(), f"t{bench.number}-clone.raw"
    bench.take(group, *volumes)
    clone(bench, group, volumes[0], target)
    with refused("VOLUME_EXISTS"):
        clone(bench, group, volumes[1], target)
    (root_of(bench) / target).unlink()
    clone(bench, group, volumes[1], target)
    assert bench.storage.digest(target) == bench.storage.digest(volumes[1])


@FILES
def test_a_clone_has_owner_mode_attributes_and_holes_of_the_volume(bench: Bench) -> None:
    volume, group, target = bench.volume(64 * MIB), bench.id(), f"t{bench.number}-clone.raw"
    path, new = root_of(bench) / volume, root_of(bench) / target
    bench.storage.write(volume, 40 * MIB, b"island")
    shutil.chown(path, 1234, 5678)
    path.chmod(0o640)
    os.setxattr(path, "user.kept", b"yes")
    bench.take(group, volume)
    clone(bench, group, volume, target)
    status = new.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1234, 5678, 0o640)
    assert os.getxattr(new, "user.kept") == b"yes"
    assert allocated_ranges(new) == allocated_ranges(path)
    assert status.st_nlink == 1


@EXT4
def test_a_gateway_killed_while_cloning_leaves_no_half_volume(own: Bench) -> None:
    volume, group, target = own.volume(256 * MIB, data=b"k" * 160 * MIB), own.id(), f"t{own.number}-clone.raw"
    own.take(group, volume)
    before, path = left_in_group(own, group), root_of(own) / target
    free = shutil.disk_usage(root_of(own)).free
    spec = rpc.CloneSpec(source=own.ref(volume), target_volume=target)
    call = own.stub.CloneGroupSnapshot.future(rpc.CloneGroupSnapshotRequest(id=group, clones=[spec]))
    while not call.done() and shutil.disk_usage(root_of(own)).free > free - 8 * MIB:
        time.sleep(0.005)
    own.gateway.kill()
    assert not path.exists() or sha256(path) == own.storage.digest(volume)
    assert left_in_group(own, group) - before <= {".clones.json"}
    own.gateway.start()
    clone(own, group, volume, target)
    assert sha256(path) == own.storage.digest(volume)


@FILES
def test_what_a_killed_clone_left_where_files_need_names_goes(bench: Bench) -> None:
    volume, group, target = bench.volume(), bench.id(), f"t{bench.number}-clone.raw"
    bench.take(group, volume)
    left = root_of(bench) / ".frostgate" / group / ".clone"
    left.write_bytes(b"half")
    clone(bench, group, volume, target)
    assert not left.exists()
    left.write_bytes(b"half")
    bench.delete(group)
    assert not bench.storage.exists(group)


@EXT4
def test_a_clone_without_room_leaves_nothing(bench: Bench) -> None:
    volume, group = bench.volume(8 * MIB, "small", data=b"f" * 8 * MIB), bench.id()
    bench.take(group, ("small", volume))
    before = left_in_group(bench, group, "small")
    with bench.storage.full("small"):
        with refused("POOL_FULL"):
            clone(bench, group, volume, "new.raw", "small")
        assert not (root_of(bench, "small") / "new.raw").exists()
        assert left_in_group(bench, group, "small") == before
    clone(bench, group, volume, "new.raw", "small")
    assert bench.storage.digest("new.raw", "small") == bench.storage.digest(volume, "small")


@XFS
@pytest.mark.expects_log("revert failed, nothing was changed")
def test_what_has_to_be_converted_is_not_called_instant(bench: Bench) -> None:
    volume, group = bench.volume(image_format="qcow2"), bench.id()
    root = root_of(bench)
    template = root / f"t{bench.number}-template.raw"
    template.write_bytes(b"t" * MIB)
    bench.volumes.append(("main", template.name))
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", template.name, str(root / volume), "4M"]
    subprocess.run(command, check=True, cwd=root)
    bench.take(group, volume)
    assert bench.revert(group, instant=True, no_safety=True).revert.failure.reason == ""
    os.truncate(template, 2 * MIB)
    before = bench.storage.digest(volume)
    assert bench.revert(group, instant=True, no_safety=True).revert.failure.reason == "CAPABILITY_MISSING"
    assert bench.storage.digest(volume) == before
    assert bench.revert(group, no_safety=True).revert.failure.reason == ""
