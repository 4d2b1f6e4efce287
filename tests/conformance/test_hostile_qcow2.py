"""qcow2 images whose headers lie: nothing outside the pool is opened, nothing but a refusal comes of it."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.conftest import XFS, Bench, refused
from tests.conformance.test_qcow2 import directory, on_template, qemu_img, volume_of
from tests.gateway_process import error_info
from tests.lab.disk import sha256

pytestmark = XFS  # what the file system can do makes no difference
__all__ = ["directory"]

SECRET = b"the host's own secret " * 3000

HOSTILE = {
    "absolute": "{secret}",
    "climbing": "../../{secret.name}",
    "climbing from within": "templates/../../{secret.name}",
    "through the mount": "{root}/../{secret.name}",
    "symlink": "template-link",
    "symlinked directory": "template-out/{secret.name}",
    "json": 'json:{{"driver":"raw","file":{{"driver":"file","filename":"{secret}"}}}}',
    "protocol": "nbd://127.0.0.1:1/x",
    "file protocol": "file:{secret}",
    "snapshot": ".frostgate/g/x.raw",
    "device": "/dev/zero",
    "fifo": "template-fifo",
    "directory": "template-directory",
    "missing": "template-missing",
    "itself": "{volume}",
}


@pytest.fixture
def traps(directory: Path, tmp_path: Path) -> Iterator[Path]:
    """The host's secret, and ways to it in the pool."""
    secret = directory.parent / f"secret-{tmp_path.name}"
    secret.write_bytes(SECRET)
    (directory / "template-link").symlink_to(secret)
    (directory / "template-out").symlink_to(directory.parent)
    (directory / "template-directory").mkdir()
    os.mkfifo(directory / "template-fifo")
    yield secret
    secret.unlink()


@pytest.mark.parametrize("name", HOSTILE)
def test_no_header_leads_out_of_the_pool(bench: Bench, directory: Path, traps: Path, name: str) -> None:
    volume, group = bench.volume(image_format="qcow2"), bench.id()
    backing = HOSTILE[name].format(secret=traps, root=directory, volume=volume)
    name_backing_file(directory / volume, backing, "qcow2" if name == "itself" else "raw")
    before = sha256(directory / volume)
    with refused("CAPABILITY_MISSING") as caught:
        bench.cut(group, volume)
    assert error_info(caught.value).metadata["volume"] == volume
    assert error_info(caught.value).metadata["backing"] == backing
    assert not bench.storage.exists(group)
    assert sha256(directory / volume) == before


def name_backing_file(image: Path, name: str, backing_format: str) -> None:
    """Write a backing file's name into a header by hand: qemu-img would look at it."""
    extension = struct.pack(">II8s", 0xE2792ACA, len(backing_format), backing_format.encode())
    with image.open("r+b") as file:
        head = bytearray(file.read(104))
        begin = struct.unpack_from(">I", head, 100)[0]
        struct.pack_into(">QI", head, 8, 4096, len(name))
        file.seek(0)
        file.write(head)
        file.seek(begin)
        file.write(extension + struct.pack(">II", 0, 0))
        file.seek(4096)
        file.write(name.encode())


def test_a_chain_that_comes_back_to_itself_is_refused(bench: Bench, directory: Path) -> None:
    volume, group = bench.volume(image_format="qcow2"), bench.id()
    for name, below in (("base-1", "base-2"), ("base-2", "base-1")):
        qemu_img("create", "-q", "-f", "qcow2", directory / name, "4M")
        name_backing_file(directory / name, below, "qcow2")
    name_backing_file(directory / volume, "base-1", "qcow2")
    with refused("CAPABILITY_MISSING"):
        bench.cut(group, volume)


def test_a_chain_too_long_is_refused(bench: Bench, directory: Path) -> None:
    volume, group = bench.volume(image_format="qcow2"), bench.id()
    for number in range(40):
        qemu_img("create", "-q", "-f", "qcow2", directory / f"base-{number}", "4M")
        name_backing_file(directory / f"base-{number}", f"base-{number + 1}", "qcow2")
    name_backing_file(directory / volume, "base-0", "qcow2")
    with refused("CAPABILITY_MISSING") as caught:
        bench.cut(group, volume)
    assert "32" in caught.value.details()


def test_a_backing_format_that_is_not_recorded_is_raw_or_refused(bench: Bench, directory: Path, tmp_path: Path) -> None:
    volume, template = on_template(bench, directory)
    with (directory / volume).open("r+b") as file:  # an older qemu-img wrote none
        file.seek(struct.unpack(">I", file.read(104)[100:])[0])
        file.write(struct.pack(">II", 0, 0))
    group = bench.id()
    bench.take(group, volume)
    assert bench.read(group, volume, 0, 8) == b"template"
    with template.open("r+b") as file:
        file.write(b"QFI\xfb")
    with refused("CAPABILITY_MISSING"):
        bench.cut(bench.id(), volume)


def test_a_data_file_is_refused(bench: Bench, directory: Path, traps: Path) -> None:
    def make(image: Path) -> None:
        data = directory / f"template-data-{image.name}"
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", image, "4M")

    volume, group = volume_of(bench, directory, make), bench.id()
    with refused("CAPABILITY_MISSING") as caught:
        bench.cut(group, volume)
    assert error_info(caught.value).metadata["volume"] == volume
    assert not bench.storage.exists(group)


@pytest.mark.parametrize(("offset", "value"), [(36, 0x7FFFFFFF), (20, 63), (56, 0xFFFFFFFF)], ids=hex)
def test_a_broken_header_is_damage_and_no_more(bench: Bench, directory: Path, offset: int, value: int) -> None:
    """A huge L1 table, clusters of 2^63 bytes, a huge refcount table."""
    volume, group = bench.volume(image_format="qcow2"), bench.id()
    with (directory / volume).open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(4, "big"))
    bench.take(group, volume)
    with refused("SNAPSHOT_DAMAGED"):
        bench.read(group, volume)
    assert bench.revert(group, no_safety=True).revert.failure.reason == ""


@pytest.mark.parametrize(
    ("offset", "content"),
    [(4, b"\0\0\0\1"), (24, (2 << 50).to_bytes(8, "big")), (8, b"\0" * 6 + b"\x10\0\xff\xff\xff\xff")],
)
def test_what_qemu_would_not_open_is_refused(bench: Bench, directory: Path, offset: int, content: bytes) -> None:
    """Version 1, a size of 2 PiB, a name of 4 GiB."""
    volume, group = bench.volume(image_format="qcow2"), bench.id()
    with (directory / volume).open("r+b") as file:
        file.seek(offset)
        file.write(content)
    with refused("INVALID_ARGUMENT"):
        bench.cut(group, volume)
    assert not bench.storage.exists(group)
