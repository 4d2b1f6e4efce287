"""qcow2 on templates, clones and changed extents over NFS: hard links, file handles, and no names to be had without."""

import os
import subprocess
from pathlib import Path

import pytest

from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.bench import Bench, refused
from tests.conformance.storages import MIB
from tests.nfs.conftest import OverNfs

POOLS = pytest.mark.parametrize("pool", ["main", "copy"])


def on_template(bench: Bench, storage: OverNfs, pool: str) -> tuple[Path, Path]:
    """A qcow2 volume on a template, made on the mount; what a guest sees of it is read by qemu-img."""
    root = storage.mounted(pool)
    template, volume = root / f"t{bench.number}-template.raw", root / f"t{bench.number}.qcow2"
    bench.volumes += [(pool, template.name), (pool, volume.name)]
    template.write_bytes(os.urandom(2 * MIB))
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", template.name, volume.name, "8M"]
    subprocess.run(create, check=True, cwd=root)
    io(volume, "write -P 65 1M 64k")
    return volume, template


def io(image: Path, command: str) -> None:
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, image], check=True, stdout=subprocess.DEVNULL)


def seen(image: Path, scratch: Path) -> bytes:
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, scratch], check=True)
    return scratch.read_bytes()


@POOLS
def test_a_volume_on_a_template_outlives_it(bench: Bench, storage: OverNfs, tmp_path: Path, pool: str) -> None:
    volume, template = on_template(bench, storage, pool)
    group, content = bench.id(), template.read_bytes()
    before = seen(volume, tmp_path / "s")
    bench.take(group, (pool, volume.name))
    io(volume, "write -P 66 3M 64k")
    template.unlink()
    assert bench.read(group, volume.name, pool=pool) == before
    revert(bench, group, pool, volume.name)
    assert template.read_bytes() == content
    assert seen(volume, tmp_path / "s") == before


def revert(bench: Bench, group: str, pool: str, volume: str) -> None:
    request = rpc.RevertGroupSnapshotRequest(id=group, volumes=[bench.ref(volume, pool)], no_safety=True)
    bench.stub.RevertGroupSnapshot(request)
    assert bench.settled(group).revert.failure.reason == ""


@POOLS
def test_a_clone_is_made_once_and_never_over_another(bench: Bench, storage: OverNfs, tmp_path: Path, pool: str) -> None:
    volume, _ = on_template(bench, storage, pool)
    group, target = bench.id(), volume.with_name(f"t{bench.number}-clone.qcow2")
    before = seen(volume, tmp_path / "s")
    bench.take(group, (pool, volume.name))
    spec = rpc.CloneSpec(source=bench.ref(volume.name, pool), target_volume=target.name)
    request = rpc.CloneGroupSnapshotRequest(id=group, clones=[spec])
    bench.volumes.append((pool, target.name))
    bench.stub.CloneGroupSnapshot(request, timeout=300)
    assert seen(target, tmp_path / "s") == before
    assert target.stat().st_nlink == 1
    io(target, "write -P 67 5M 64k")
    written = seen(target, tmp_path / "s")
    bench.stub.CloneGroupSnapshot(request, timeout=300)
    assert seen(target, tmp_path / "s") == written
    target.unlink()
    target.write_bytes(b"another")
    with refused("VOLUME_EXISTS"):
        bench.stub.CloneGroupSnapshot(request, timeout=300)
    assert target.read_bytes() == b"another"


@POOLS
def test_what_changed_is_told_exactly(bench: Bench, storage: OverNfs, tmp_path: Path, pool: str) -> None:
    volume, _ = on_template(bench, storage, pool)
    old, new = bench.id(), bench.id()
    bench.take(old, (pool, volume.name))
    io(volume, "write -P 68 4M 64k")
    bench.take(new, (pool, volume.name))
    for coarse in (False, True):
        request = rpc.ListChangedExtentsRequest(id=new, volume=bench.ref(volume.name, pool), base_id=old, coarse=coarse)
        answers = bench.stub.ListChangedExtents(request, timeout=300)
        assert [(e.offset, e.length) for answer in answers for e in answer.extents] == [(4 * MIB, 65536)]
