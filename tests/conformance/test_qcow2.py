"""qcow2 volumes of every kind, through cut, reading, revert and clone, against qemu-img; and hostile ones."""

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.conftest import FILES, Bench
from tests.conformance.storages import MIB, Directory

pytestmark = FILES

SIZE = 16 * MIB
SECRET = b"the host's own secret " * 3000


def qemu_img(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


def qemu_io(image: Path, *commands: str, options: tuple[str, ...] = ("-f", "qcow2")) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", *options, *words, image], capture_output=True, text=True, check=True)
    assert "failed" not in done.stdout, done.stdout


def guest_bytes(image: Path, scratch: Path) -> bytes:
    """What a guest sees of an image, by qemu-img, which follows the header's names."""
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, scratch)
    try:
        return scratch.read_bytes()
    finally:
        scratch.unlink()


def plain(image: Path, *options: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", *options, image, str(SIZE))
    qemu_io(image, "write -P 65 3M 2M", "write -P 66 9M 64k", "write -P 67 15M 1M", "discard 4M 512k")


def made(*options: str) -> Callable[[Path], None]:
    return lambda image: plain(image, *options)


def compressed(kind: str) -> Callable[[Path], None]:
    def make(image: Path) -> None:
        raw = image.with_name(f".{image.name}.raw")
        raw.write_bytes(b"compress me well " * (MIB // 4) + os.urandom(MIB))
        os.truncate(raw, SIZE)
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}", raw, image)
        raw.unlink()
        qemu_io(image, "write -P 70 1M 128k")

    return make


def with_internal_snapshot(image: Path) -> None:
    plain(image)
    qemu_img("snapshot", "-c", "before", image)
    qemu_io(image, "write -P 99 3M 1M")


def dirty(image: Path) -> None:
    """As a VM that died leaves it: lazy refcounts, and the flag that says so."""
    plain(image, "-o", "lazy_refcounts=on")
    with image.open("r+b") as file:
        file.seek(72)
        flags = struct.unpack(">Q", file.read(8))[0]
        file.seek(72)
        file.write(struct.pack(">Q", flags | 1))


def with_bitmap(image: Path) -> None:
    plain(image)
    qemu_img("bitmap", "--add", "-f", "qcow2", image, "changes")


def on_raw_template(image: Path) -> None:
    template = image.with_name(f"template-of-{image.name}.raw")
    template.write_bytes(b"template" * (2 * MIB // 8))
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", template.name, image, str(SIZE))
    qemu_io(image, "write -P 65 1M 64k", "write -P 66 12M 64k")


def on_chain(image: Path) -> None:
    """Three deep, one in a directory, named absolutely, relatively to itself, and shorter than what lies on it."""
    below = image.parent / f"templates-of-{image.name}"
    below.mkdir()
    (below / "ground.raw").write_bytes(b"ground" * (3 * MIB // 6))
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "ground.raw", below / "middle.qcow2", str(8 * MIB))
    qemu_io(below / "middle.qcow2", "write -P 80 2M 128k")
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below / "middle.qcow2", image, str(SIZE))
    qemu_io(image, "write -P 65 1M 64k", "write -z 2M 64k", "write -P 66 15M 64k")


KINDS: dict[str, Callable[[Path], None]] = {
    "plain": plain,
    "compat-0.10": made("-o", "compat=0.10"),
    "cluster-512": made("-o", "cluster_size=512"),
    "cluster-2M": made("-o", "cluster_size=2M"),
    "extended-l2": made("-o", "extended_l2=on,cluster_size=128k"),
    "lazy-refcounts": made("-o", "lazy_refcounts=on"),
    "refcount-1-bit": made("-o", "refcount_bits=1"),
    "preallocated": made("-o", "preallocation=metadata"),
    "compressed-zlib": compressed("zlib"),
    "compressed-zstd": compressed("zstd"),
    "internal-snapshot": with_internal_snapshot,
    "dirty": dirty,
    "bitmap": with_bitmap,
    "raw-template": on_raw_template,
    "chain-of-three": on_chain,
}


@pytest.fixture
def directory(bench: Bench) -> Path:
    """The pool's directory; what a test leaves beside its volumes is removed."""
    assert isinstance(bench.storage, Directory)
    root = bench.storage.root("main")
    before = set(root.iterdir())
    yield root
    for path in set(root.iterdir()) - before:
        if path.name.startswith(("template", "base")):
            subprocess.run(["rm", "-r", path], check=True)


def volume_of(bench: Bench, directory: Path, make: Callable[[Path], None]) -> str:
    name = f"t{bench.number}-{len(bench.volumes)}.qcow2"
    bench.volumes.append(("main", name))
    make(directory / name)
    return name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_qcow2_is_read_as_the_guest_saw_it(
    bench: Bench, directory: Path, tmp_path: Path, kind: str
) -> None:
    volume, group = volume_of(bench, directory, KINDS[kind]), bench.id()
    before = guest_bytes(directory / volume, tmp_path / "oracle")
    taken = bench.take(group, volume)
    assert taken.members[0].size_bytes == SIZE
    if kind != "dirty":  # QEMU would repair it
        qemu_io(directory / volume, "write -P 1 0 1M")
    assert bench.read(group, volume) == before
