"""Members that are chains of images of ours, as incremental snapshots are: read, compared, cloned, reverted to."""

import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from providers.base import CapabilityMissing, Extent, SnapshotDamaged, SnapshotNotFound
from providers.nfs import chains, layout, qemu
from providers.nfs.options import NfsOptions
from providers.nfs.provider import NfsProvider
from tests.lab.disk import allocated_ranges

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[NfsProvider]:
    """A raw volume, snapshot "full" as one qcow2 image, and "delta" as one that lies on it."""
    (tmp_path / "v.raw").write_bytes(bytes(MIB) + os.urandom(2 * MIB) + bytes(5 * MIB))
    make(tmp_path, "full")
    write(tmp_path, "full", "-f", "raw", "-O", "qcow2", tmp_path / "v.raw")
    settle(tmp_path, "full", [])
    with (tmp_path / "v.raw").open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"n" * 65536)
    make(tmp_path, "delta")
    image = tmp_path / ".frostgate/delta/v.raw"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P {ord('n')} 2M 64k", image]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    below = qemu.Image(os.open(tmp_path / ".frostgate/full/v.raw", os.O_RDONLY), "qcow2")
    group_fd = os.open(tmp_path / ".frostgate/delta", os.O_RDONLY)
    settle(tmp_path, "delta", chains.keep(group_fd, [chains.Backing("", below)], cloning=False))
    os.close(group_fd)
    os.close(below.descriptor)
    provider = NfsProvider.open_pool("p", NfsOptions(root=tmp_path))
    yield provider
    provider.close()


def make(root: Path, group: str) -> None:
    (root / ".frostgate" / group).mkdir(parents=True)


def write(root: Path, group: str, *words: str | Path) -> None:
    subprocess.run(["qemu-img", "convert", *words, root / ".frostgate" / group / "v.raw"], check=True)


def settle(root: Path, group: str, backing: list[layout.StoredBacking]) -> None:
    with (root / "v.raw").open("rb") as volume:
        attributes = layout.Attributes.of(volume.fileno())
    member = layout.StoredMember(
        volume="v.raw",
        size_bytes=SIZE,
        format="raw",
        mode="copy",
        image_format="qcow2",
        attributes=attributes,
        backing=backing,
    )
    directory = os.open(root / ".frostgate" / group, os.O_RDONLY)
    manifest = layout.Manifest(group=group, cut_time=datetime.now(UTC), members=[member])
    layout.write(directory, layout.MANIFEST, manifest)
    os.close(directory)


def nothing(done: int, total: int) -> None:
    assert 0 <= done <= total


def content(pool: NfsProvider, group: str) -> bytes:
    with pool.open(group, "v.raw") as reader:
        return reader.read(0, reader.size_bytes)


def test_it_reads_as_the_whole_and_outlives_what_it_was_made_on(pool: NfsProvider, tmp_path: Path) -> None:
    now = (tmp_path / "v.raw").read_bytes()
    assert content(pool, "delta") == now
    assert content(pool, "full") != now
    pool.delete("full", nothing)
    assert content(pool, "delta") == now


def test_only_what_the_newer_has_is_told_as_changed(pool: NfsProvider) -> None:
    changes = [Extent(2 * MIB, 65536)]
    assert list(pool.changed_extents("delta", "v.raw", "full")) == changes
    assert list(pool.changed_extents("full", "v.raw", "delta")) == changes
    assert list(pool.changed_extents("delta", "v.raw", None)) == [Extent(MIB, 2 * MIB)]


def test_a_clone_is_a_plain_sparse_file_of_the_volume_s_format(pool: NfsProvider, tmp_path: Path) -> None:
    volume = pool.clone("delta", "v.raw", "new.raw", nothing)
    assert (volume.size_bytes, volume.format) == (SIZE, "raw")
    assert (tmp_path / "new.raw").read_bytes() == (tmp_path / "v.raw").read_bytes()
    assert sum(length for _, length in allocated_ranges(tmp_path / "new.raw")) == 2 * MIB


def test_a_revert_is_converted_and_never_instant(pool: NfsProvider, tmp_path: Path) -> None:
    snapshot = content(pool, "full")
    with pytest.raises(CapabilityMissing):
        pool.prepare_revert("full", ["v.raw"], nothing, instant=True)
    pool.abort_revert("full")
    pool.prepare_revert("full", ["v.raw"], nothing)
    pool.revert("full", ["v.raw"], nothing)
    assert (tmp_path / "v.raw").read_bytes() == snapshot


def test_what_was_lost_or_written_below_it_is_said(pool: NfsProvider, tmp_path: Path) -> None:
    (kept,) = (tmp_path / ".frostgate/delta/.backing").iterdir()
    with kept.open("ab") as file:
        file.write(b"more")
    with pytest.raises(SnapshotDamaged):
        pool.open("delta", "v.raw")
    kept.unlink()
    with pytest.raises(SnapshotNotFound):
        pool.open("delta", "v.raw")
