"""What a restored file has beside its content, what it has not, and what holes and full disks cost."""

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.filesystems import unmount
from tests.lab.images import described, mount_image
from tests.mounting import MIB, Images, image_pool, kernel, taken

ACCESS = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"
CAPABILITY = "security.capability"
SPARSE_BYTES = 4 << 40
PLACES = range(64 * MIB, 1 << 30, 200 * MIB)


def access_list(*, group: int, mask: int) -> bytes:
    """user::rw-, user:1000:rwx, group::GROUP, mask::MASK, other::---."""
    entries = [(0x01, 6, -1), (0x02, 7, 1000), (0x04, group, -1), (0x10, mask, -1), (0x20, 0, -1)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *one) for one in entries)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """One volume with files that have something to keep."""
    with image_pool(tmp_path_factory.mktemp("kept"), "kept-pool", 1024 * MIB) as made:
        image = made.pool / "ext4.raw"
        with image.open("wb") as file:
            file.truncate(200 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", image], check=True)
        root = made.scratch / "fill"
        root.mkdir()
        mount_image("ext4", image, root, writable=True)
        try:
            fill(root)
        finally:
            unmount(root)
        yield made


def fill(root: Path) -> None:
    rights = root / "rights"
    (rights / "listed").mkdir(parents=True)
    for name in ("plain", "listed/new", "acl", "capable", "setuid"):
        (rights / name).write_text(name)
        os.chmod(rights / name, 0o640)
    os.setxattr(rights / "acl", ACCESS, access_list(group=5, mask=7))
    os.setxattr(rights / "listed", DEFAULT, access_list(group=5, mask=7))
    # CAP_NET_RAW, effective: vfs_cap_data of capability.h, revision 2
    os.setxattr(rights / "capable", CAPABILITY, struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0))
    os.chmod(rights / "setuid", 0o6755)
    os.mknod(rights / "device", 0o660 | 0o060000, os.makedev(7, 1))
    os.mknod(rights / "socket", 0o660 | 0o140000)
    (root / "one").mkdir()
    (root / "two").mkdir()
    (root / "one" / "a").write_text("linked")
    os.link(root / "one" / "a", root / "two" / "b")
    os.link(root / "one" / "a", root / "c")
    with (root / "sparse").open("wb") as file:
        file.write(b"begin")
        for place in PLACES:
            file.seek(place + 4711)
            file.write(b"middle" * 1000)
        file.truncate(SPARSE_BYTES)
        file.seek(SPARSE_BYTES - 3)
        file.write(b"end")
    (root / "big").write_bytes(os.urandom(4 * MIB))


@pytest.fixture(scope="module")
def snapshot(images: Images) -> Iterator[str]:
    with taken(images, "kept", "ext4.raw") as made:
        yield f"{made}:ext4.raw/whole"


@contextmanager
def small_disk(images: Images, options: str) -> Iterator[Path]:
    directory = images.scratch / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "small", directory], check=True)
    try:
        yield directory
    finally:
        unmount(directory)
        directory.rmdir()


def attributes(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path)}


def test_access_lists_stay_and_capabilities_and_set_user_id_bits_only_when_told(images: Images, snapshot: str) -> None:
    with kernel(images, "ext4") as mine:
        theirs = described(mine / "rights", posix=True)
        lists = {name: attributes(mine / "rights" / name) for name in ("acl", "listed")}
    out = images.scratch / "rights"
    told = images.json("restore", f"{snapshot}/rights", out, "--privileged")
    assert (told["problems"], sum(told["left_out"].values())) == ([], 0)
    assert described(out, posix=True) == theirs
    assert attributes(out / "capable")
    for _ in range(2):  # over what is there with more rights, and anew
        told = images.json("restore", f"{snapshot}/rights", out)
        assert told["problems"] == []
        assert told["left_out"]["set_id_bits"] == told["left_out"]["attributes"] == 1
        assert told["left_out"]["devices"] == told["left_out"]["sockets"] == 1
        assert {name: attributes(out / name) for name in lists} == lists
        assert (out / "setuid").stat().st_mode & 0o7777 == 0o755
        assert CAPABILITY not in attributes(out / "capable")
        subprocess.run(["rm", "-r", out], check=True)
    words = images.cli("restore", f"{snapshot}/rights", out, check=True)
    assert "left out: 1 set-user-id or set-group-id bits, 1 attributes that give rights" in words.stdout
    # what is new in a directory with a default list does not get it
    (out / "listed" / "new").unlink()
    images.cli("restore", f"{snapshot}/rights", out, check=True)
    assert ACCESS not in attributes(out / "listed" / "new")
    assert (out / "listed" / "new").stat().st_mode & 0o777 == 0o640
    subprocess.run(["rm", "-r", out], check=True)


def test_a_list_that_is_not_kept_does_not_widen_the_groups_rights(images: Images, snapshot: str) -> None:
    out = images.scratch / "ours"
    told = images.json("restore", f"{snapshot}/rights", out, "--no-owners")
    assert told["left_out"]["access_lists"] == 2
    assert (out / "acl").stat().st_mode & 0o777 == 0o650
    assert attributes(out / "acl") == {}
    # nor on a file system that has no such lists
    subprocess.run(["rm", "-r", out], check=True)
    out.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", out], check=True)
    try:
        done = images.cli("restore", f"{snapshot}/rights", f"{out}/")
        assert done.returncode == 1
        assert f"{out}/rights/acl: attribute {ACCESS}: Operation not supported" in done.stderr
        assert (out / "rights" / "acl").stat().st_mode & 0o777 == 0o650
    finally:
        unmount(out)


def test_hard_links_between_the_places_of_one_command_stay(images: Images, snapshot: str) -> None:
    out = images.scratch / "links"
    for _ in range(2):
        told = images.json("restore", *(f"{snapshot}/{name}" for name in ("one", "two", "c")), out)
        assert told["problems"] == []
        found = [(out / name).stat() for name in ("one/a", "two/b", "c")]
        assert {(one.st_ino, one.st_nlink) for one in found} == {(found[0].st_ino, 3)}
    assert told["files"] == 0


def test_holes_are_neither_read_nor_written_nor_compared(images: Images, snapshot: str) -> None:
    out = images.scratch / "holes"
    told = images.json("restore", f"{snapshot}/sparse", out, "--verify")
    assert (told["files"], told["bytes"], told["repaired"]) == (1, SPARSE_BYTES, 0)
    with kernel(images, "ext4") as mine, (mine / "sparse").open("rb") as theirs, out.open("rb") as ours:
        for place in (0, *PLACES, SPARSE_BYTES - MIB):
            theirs.seek(place)
            ours.seek(place)
            assert ours.read(MIB) == theirs.read(MIB)
        assert out.stat().st_blocks <= (mine / "sparse").stat().st_blocks + 8
    # what is no hole any more is found
    status = out.stat()
    with out.open("r+b") as file:
        file.seek(1 << 41)
        file.write(b"x")
    os.utime(out, ns=(status.st_atime_ns, status.st_mtime_ns))
    told = images.json("restore", f"{snapshot}/sparse", out)
    assert told["unchanged"] == 1
    told = images.json("restore", f"{snapshot}/sparse", out, "--verify")
    assert told["repaired"] == 1
    with out.open("rb") as file:
        file.seek(1 << 41)
        assert file.read(1) == b"\0"
    out.unlink()


def test_a_disk_that_is_full_or_read_only_is_refused_with_its_file(images: Images, snapshot: str) -> None:
    with small_disk(images, "size=2m") as directory:
        for place, destination, name in (
            ("big", directory / "big", "big"),
            ("big", f"{directory}/", "big"),
        ):
            told = images.cli("restore", f"{snapshot}/{place}", destination)
            assert told.returncode == 4
            assert f"{directory}/{name}: No space left on device" in told.stderr
    with small_disk(images, "ro") as directory:
        told = images.cli("restore", f"{snapshot}/one", directory / "one")
        assert told.returncode == 4
        assert f"{directory}/one: Read-only file system" in told.stderr
