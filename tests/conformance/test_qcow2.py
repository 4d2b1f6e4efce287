"""qcow2 volumes of every kind, and on templates, through cut, reading, revert and clone, against qemu-img."""

import json
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.conftest import EXT4, FILES, XFS, Bench, refused
from tests.conformance.storages import MIB, Directory
from tests.lab.disk import sha256

SIZE = 16 * MIB


def qemu_img(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


def qemu_io(image: Path, *commands: str, options: tuple[str, ...] = ("-f", "qcow2"), opened: str = "") -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", *options, *words, opened or image], capture_output=True, text=True, check=True)
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
def directory(bench: Bench) -> Iterator[Path]:
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


def extents_of(bench: Bench, group: str, volume: str) -> list[tuple[int, int]]:
    request = rpc.ListAllocatedExtentsRequest(id=group, volume=bench.ref(volume))
    responses = bench.stub.ListAllocatedExtents(request)
    return [(extent.offset, extent.length) for response in responses for extent in response.extents]


def mapped(image: Path) -> list[tuple[int, int]]:
    """What of an image is not zeros, by qemu-img, which follows the header's names."""
    found: list[tuple[int, int]] = []
    for entry in json.loads(qemu_img("map", "-f", "qcow2", "--output=json", image)):
        begin, length = entry["start"], entry["length"]
        if entry["zero"]:
            continue
        if found and sum(found[-1]) == begin:
            begin, length = found[-1][0], found[-1][1] + length
            found.pop()
        found.append((begin, length))
    return found


@EXT4
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_cloned_and_reverted_as_the_guest_saw_it(
    bench: Bench, directory: Path, tmp_path: Path, kind: str
) -> None:
    check_kind(bench, directory, tmp_path, kind)


@XFS
@pytest.mark.parametrize("kind", ["plain", "cluster-2M", "internal-snapshot", "raw-template", "chain-of-three"])
def test_it_is_also_where_files_are_cloned(bench: Bench, directory: Path, tmp_path: Path, kind: str) -> None:
    check_kind(bench, directory, tmp_path, kind)


def check_kind(bench: Bench, directory: Path, tmp_path: Path, kind: str) -> None:
    volume, group = volume_of(bench, directory, KINDS[kind]), bench.id()
    path, clone = directory / volume, f"c-{volume}"
    before, map_before = guest_bytes(path, tmp_path / "oracle"), mapped(path)
    assert bench.take(group, volume).members[0].size_bytes == SIZE
    if kind == "dirty":  # QEMU refuses to write without a repair
        path.write_bytes(b"broken")
    else:
        qemu_io(path, "write -P 1 0 4M", "write -P 2 14M 2M")
    assert bench.read(group, volume) == before
    extents = extents_of(bench, group, volume)
    assert all(
        any(begin <= offset and end <= begin + size for begin, size in map_before) for offset, end in ends(extents)
    )
    assert zeroed(before, extents) == bytes(SIZE)
    clone_to(bench, group, volume, clone)
    assert guest_bytes(directory / clone, tmp_path / "oracle") == before
    bench.revert(group, no_safety=True)
    assert guest_bytes(path, tmp_path / "oracle") == before
    if kind == "internal-snapshot":
        qemu_img("snapshot", "-a", "before", path)
        assert guest_bytes(path, tmp_path / "oracle")[3 * MIB] == 65


def ends(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(offset, offset + length) for offset, length in extents]


def zeroed(content: bytes, extents: list[tuple[int, int]]) -> bytes:
    """A disk without what is in the extents."""
    left = bytearray(content)
    for offset, end in ends(extents):
        left[offset:end] = bytes(end - offset)
    return bytes(left)


def clone_to(bench: Bench, group: str, volume: str, target: str) -> None:
    bench.volumes.append(("main", target))
    clones = [rpc.CloneSpec(source=bench.ref(volume), target_volume=target)]
    bench.stub.CloneGroupSnapshot(rpc.CloneGroupSnapshotRequest(id=group, clones=clones), timeout=60)


@XFS
def test_an_encrypted_image_is_kept_faithfully_and_its_bytes_are_not_told(bench: Bench, directory: Path) -> None:
    secret = ("--object", "secret,id=s,data=guess")

    def encrypted(image: Path) -> None:
        options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
        qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", options, image, "4M")
        qemu_io(image, "write -P 65 1M 1M", options=(*secret, "--image-opts"), opened=opened(image))

    def opened(image: Path) -> str:
        return f"driver=qcow2,file.filename={image},encrypt.key-secret=s"

    volume, group = volume_of(bench, directory, encrypted), bench.id()
    path, clone = directory / volume, f"c-{volume}"
    before = sha256(path)
    bench.take(group, volume)
    qemu_io(path, "write -P 66 1M 1M", options=(*secret, "--image-opts"), opened=opened(path))
    with refused("CAPABILITY_MISSING") as caught:
        bench.read(group, volume)
    assert "encrypted" in caught.value.details()
    clone_to(bench, group, volume, clone)
    bench.revert(group, no_safety=True)
    assert sha256(path) == sha256(directory / clone) == before
    qemu_io(path, "read -P 65 1M 1M", options=(*secret, "--image-opts"), opened=opened(path))


def on_template(bench: Bench, directory: Path, name: str = "") -> tuple[str, Path]:
    """A volume on a template of 2 MiB, the way CloudStack makes them."""
    template = directory / f"template-{bench.number}"
    template.write_bytes(b"template" * (2 * MIB // 8))

    def make(image: Path) -> None:
        qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", template, image, "4M")
        qemu_io(image, "write -P 65 1M 64k")
        if name:
            qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", name, image)

    return volume_of(bench, directory, make), template


@XFS
def test_a_template_is_named_as_the_hypervisors_see_it(bench: Bench, directory: Path, tmp_path: Path) -> None:
    volume, template = on_template(bench, directory)
    before = guest_bytes(directory / volume, tmp_path / "oracle")
    seen = f"/mnt/as-the-hypervisor-sees-it/{template.name}"
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", seen, directory / volume)
    group = bench.id()
    bench.take(group, volume)
    assert bench.read(group, volume) == before


@FILES
def test_a_template_deleted_since_is_put_back(bench: Bench, directory: Path, tmp_path: Path) -> None:
    volume, template = on_template(bench, directory)
    group, clone = bench.id(), f"c-{volume}"
    before, content = guest_bytes(directory / volume, tmp_path / "oracle"), template.read_bytes()
    template.chmod(0o644)
    bench.take(group, volume)
    (directory / volume).unlink()
    template.unlink()
    assert bench.read(group, volume) == before
    bench.revert(group, no_safety=True)
    assert template.read_bytes() == content
    assert template.stat().st_mode & 0o777 == 0o644
    assert guest_bytes(directory / volume, tmp_path / "oracle") == before
    template.unlink()
    clone_to(bench, group, volume, clone)
    assert guest_bytes(directory / clone, tmp_path / "oracle") == before
    bench.delete(group)
    assert template.read_bytes() == content


@FILES
def test_a_template_replaced_since_is_left_alone_and_not_needed(bench: Bench, directory: Path, tmp_path: Path) -> None:
    volume, template = on_template(bench, directory)
    group, clone = bench.id(), f"c-{volume}"
    before = guest_bytes(directory / volume, tmp_path / "oracle")
    bench.take(group, volume)
    other = template.with_name("base-other")
    other.write_bytes(b"another!" * (2 * MIB // 8))
    other.rename(template)
    assert bench.read(group, volume) == before
    clone_to(bench, group, volume, clone)
    bench.revert(group, no_safety=True)
    assert guest_bytes(directory / volume, tmp_path / "oracle") == before
    assert guest_bytes(directory / clone, tmp_path / "oracle") == before
    assert "backing file" not in qemu_img("info", directory / volume)
    assert template.read_bytes() == b"another!" * (2 * MIB // 8)


@FILES
@pytest.mark.expects_log("revert failed, nothing was changed")
def test_a_template_written_in_place_is_noticed_or_does_not_matter(
    bench: Bench, directory: Path, tmp_path: Path
) -> None:
    volume, template = on_template(bench, directory)
    group = bench.id()
    before = guest_bytes(directory / volume, tmp_path / "oracle")
    bench.take(group, volume)
    with template.open("r+b") as file:
        file.write(b"changed")
    if bench.storage.clones:
        assert bench.read(group, volume) == before
        bench.revert(group, no_safety=True)
        assert guest_bytes(directory / volume, tmp_path / "oracle") == before
        return
    now = sha256(directory / volume)
    for verb in (lambda: bench.read(group, volume), lambda: clone_to(bench, group, volume, f"c-{volume}")):
        with refused("SNAPSHOT_DAMAGED") as caught:
            verb()
        assert template.name in caught.value.details()
    assert bench.revert(group, no_safety=True).revert.failure.reason == "SNAPSHOT_DAMAGED"
    assert sha256(directory / volume) == now


@XFS
def test_a_resize_between_prepare_and_cut_is_noticed(bench: Bench) -> None:
    volume, group = bench.volume(image_format="qcow2"), bench.id()
    bench.prepare(group, volume)
    qemu_img("resize", "-q", "-f", "qcow2", bench.storage.source(volume)["file"], "8M")
    with refused("VOLUME_CHANGED"):
        bench.cut(group)
    assert bench.take(bench.id(), volume).members[0].size_bytes == 8 * MIB


@XFS
def test_another_backing_file_between_prepare_and_cut_is_noticed(bench: Bench, directory: Path) -> None:
    volume, template = on_template(bench, directory)
    group = bench.id()
    bench.prepare(group, volume)
    template.with_name(f"{template.name}-2").write_bytes(template.read_bytes())
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", f"{template}-2", directory / volume)
    with refused("VOLUME_CHANGED"):
        bench.cut(group)


@XFS
def test_a_volume_that_qemu_writes_to_is_cut_whole(bench: Bench, directory: Path, tmp_path: Path) -> None:
    """As under a VM: what it flushed is there, with the tables that lead to it, while the template is in use too."""
    volume, template = on_template(bench, directory)
    path, socket = directory / volume, tmp_path / "nbd"
    node = {
        "driver": "qcow2",
        "node-name": "disk",
        "file": {"driver": "file", "filename": str(path)},
        "backing": {"driver": "raw", "file": {"driver": "file", "filename": str(template)}},
    }
    server, export = f"addr.type=unix,addr.path={socket}", "type=nbd,id=e,node-name=disk,name=,writable=on"
    command = ["qemu-storage-daemon", "--blockdev", json.dumps(node), "--nbd-server", server, "--export", export]
    with subprocess.Popen(command) as daemon:
        try:
            write_through(socket, daemon, "write -P 71 2M 1M", "write -P 72 0 64k", "flush")
            groups = [bench.id(), bench.id()]
            bench.take(groups[0], volume)
            write_through(socket, daemon, "write -P 73 3M 1M", "write -P 74 2M 64k", "flush")
            bench.take(groups[1], volume)
            assert bench.get(groups[1]).members[0].mode == "clone"
        finally:
            daemon.terminate()
    for group, expected in ((groups[0], {0: 72, 2 * MIB: 71, 3 * MIB: 0}), (groups[1], {2 * MIB: 74, 3 * MIB: 73})):
        qemu_img("check", "-f", "qcow2", directory / ".frostgate" / group / volume)
        content = bench.read(group, volume)
        assert {offset: content[offset] for offset in expected} == expected
        assert content[64 * 1024 : MIB] == template.read_bytes()[64 * 1024 : MIB]


def write_through(socket: Path, daemon: subprocess.Popen[bytes], *commands: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        words = [word for command in commands for word in ("-c", command)]
        words = ["qemu-io", "-f", "raw", *words, f"nbd+unix:///?socket={socket}"]
        done = subprocess.run(words, check=False, capture_output=True)
        if done.returncode == 0:
            return
        assert daemon.poll() is None
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.05)
