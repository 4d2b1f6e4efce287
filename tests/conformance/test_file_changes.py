"""Changed extents of files, against a comparison of every byte: raw, qcow2 and what lies on a template."""

import ctypes
import os
import random
import subprocess
from pathlib import Path

import pytest

from providers.nfs import copying, fiemap
from tests.conformance.conftest import EXT4, XFS, Bench
from tests.conformance.storages import MIB, Directory
from tests.conformance.test_changes import Extents, changed
from tests.lab import state
from tests.lab.filesystems import mount_filesystem

SIZE = 24 * MIB
UNTOUCHED = 4 * MIB
BLOCK = 4096
_PUNCH_HOLE, _KEEP_SIZE = 2, 1


def punch(descriptor: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(_PUNCH_HOLE | _KEEP_SIZE), ctypes.c_long(offset), ctypes.c_long(length))
    assert libc.fallocate(ctypes.c_int(descriptor), *arguments) == 0


def scribble(path: Path, chance: random.Random) -> None:
    """Write, punch, and allocate without writing, nothing synced."""
    with path.open("r+b", buffering=0) as file:
        for _ in range(12):
            offset, length = chance.randrange(UNTOUCHED, SIZE - MIB), chance.choice([1, 511, BLOCK, 70_000, MIB // 2])
            how = chance.randrange(5)
            if how == 0:
                punch(file.fileno(), offset, length)
            elif how == 1:
                os.posix_fallocate(file.fileno(), offset, length)
            elif how == 2:  # the same bytes once more
                os.pwrite(file.fileno(), os.pread(file.fileno(), length, offset), offset)
            else:
                os.pwrite(file.fileno(), chance.randbytes(length), offset)


def scribble_qcow2(path: Path, chance: random.Random) -> None:
    commands = []
    for _ in range(12):
        offset, length = chance.randrange(UNTOUCHED, SIZE - MIB, 512), chance.choice([512, 4096, 70_144, MIB // 2])
        word = chance.choice(["write -P {0}", "write -P {0}", "write -z", "write -z -u", "discard"])
        commands += ["-c", f"{word.format(chance.randrange(256))} {offset} {length}"]
    subprocess.run(["qemu-io", "-d", "unmap", "-f", "qcow2", *commands, path], check=True, stdout=subprocess.DEVNULL)


def different_blocks(older: bytes, newer: bytes) -> set[int]:
    older = older[: len(newer)].ljust(len(newer), b"\0")
    offsets = range(0, len(newer), BLOCK)
    return {offset for offset in offsets if older[offset : offset + BLOCK] != newer[offset : offset + BLOCK]}


def blocks_of(extents: Extents) -> set[int]:
    return {block for offset, length in extents for block in range(offset // BLOCK * BLOCK, offset + length, BLOCK)}


@EXT4
@pytest.mark.parametrize("kind", ["raw", "on a template"])
def test_what_is_told_is_exactly_what_differs(bench: Bench, kind: str) -> None:
    check_changes(bench, kind)


@XFS
@pytest.mark.parametrize("kind", ["raw", "qcow2", "small clusters", "on a template"])
def test_it_is_also_what_clones_share_that_is_left_out(bench: Bench, kind: str) -> None:
    check_changes(bench, kind)


def check_changes(bench: Bench, kind: str) -> None:
    chance = random.Random(kind)
    assert isinstance(bench.storage, Directory)
    volume = bench.volume(SIZE, image_format="raw" if kind == "raw" else "qcow2")
    path, template = bench.storage.root("main") / volume, bench.storage.root("main") / f"t{bench.number}-template.raw"
    if kind == "small clusters":
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, str(SIZE)], check=True
        )
    elif kind == "on a template":
        template.write_bytes(chance.randbytes(8 * MIB))
        bench.volumes.append(("main", template.name))
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", template.name, path.name, str(SIZE)]
        subprocess.run(command, check=True, cwd=path.parent)
    if kind == "raw":
        bench.storage.write(volume, 0, chance.randbytes(UNTOUCHED))
    else:
        command = ["qemu-io", "-f", "qcow2", "-c", f"write -P 42 0 {UNTOUCHED}", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    groups, contents = [], []
    for _ in range(3):
        (scribble if kind == "raw" else scribble_qcow2)(path, chance)
        groups.append(bench.id())
        bench.take(groups[-1], volume)
        contents.append(bench.read(groups[-1], volume))
    for older, newer in ((0, 1), (1, 2), (2, 0)):
        differing = different_blocks(contents[older], contents[newer])
        exact = changed(bench, groups[newer], volume, groups[older])
        assert blocks_of(exact) == differing
        coarse = changed(bench, groups[newer], volume, groups[older], coarse=True)
        assert blocks_of(coarse) >= differing
        if bench.storage.clones:  # it is of use
            assert sum(block < UNTOUCHED for block in blocks_of(coarse)) < 16


def test_blocks_said_to_be_shared_have_the_same_bytes() -> None:
    """FIEMAP of files that are written to meanwhile, nothing synced, with allocated and unwritten ranges."""
    chance = random.Random(11)
    with mount_filesystem("xfs", state.prepare() / "fiemap", 320 * MIB) as filesystem:
        first, second = filesystem.directory / "first", filesystem.directory / "second"
        first.write_bytes(chance.randbytes(SIZE))
        for path in (first, second, first, second):
            if path is second:
                with first.open("rb") as source, second.open("w+b") as target:
                    copying.clone(source.fileno(), target.fileno())
            scribble(path, chance)
            with first.open("rb") as one, second.open("ab+") as other:
                size = os.fstat(other.fileno()).st_size
                shared = list(fiemap.shared(one.fileno(), 0, other.fileno(), 0, size))
                parts = list(fiemap.shared(one.fileno(), 5 * MIB + 512, other.fileno(), 5 * MIB + 512, MIB))
            contents = first.read_bytes(), second.read_bytes()
            for position, length in [*shared, *((begin + 5 * MIB + 512, length) for begin, length in parts)]:
                assert contents[0][position : position + length] == contents[1][position : position + length]
            if path is second:  # and now that all is on the disk, nearly all that is shared is found
                with first.open("rb") as one, second.open("rb") as other:
                    shared = list(fiemap.shared(one.fileno(), 0, other.fileno(), 0, SIZE))
                assert sum(length for _, length in shared) > SIZE // 2
        with first.open("rb") as one, second.open("rb") as other:
            for position, length in fiemap.shared(one.fileno(), 0, other.fileno(), MIB, SIZE - MIB):
                assert (
                    contents[0][position : position + length] == contents[1][MIB + position : MIB + position + length]
                )
    state.release()
