"""One odd or damaged file costs itself: its siblings are listed, found, read and mounted, and it is said."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.filesystems import make_filesystem, unmount
from tests.lab.images import described, mount_image
from tests.mounting import MIB, Images, image_pool, mounted, taken

SIBLINGS = ("a sibling", "z sibling")
FAR = 10_413_792_000  # 2300-01-01, which anybody can set, and 64 bits of nanoseconds do not hold
SEEN: dict[str, tuple[int, dict[bytes, tuple[object, ...]]]] = {}
"""Of the root's time and everything below, what the kernel said while it was mounted, before there was /tmp/broken."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    with image_pool(tmp_path_factory.mktemp("damaged"), "damaged-pool", 4096 * MIB) as made:
        for kind in ("ext4", "xfs"):
            image = made.pool / f"{kind}.raw"
            make_filesystem(kind, image, 320 * MIB)  # type: ignore[arg-type]
            directory = made.scratch / f"fill-{kind}"
            directory.mkdir()
            mount_image(kind, image, directory, writable=True)  # type: ignore[arg-type]
            try:
                fill(directory)
                SEEN[kind] = (directory.stat().st_mtime_ns, described(directory, posix=True))
                (directory / "tmp" / "broken").write_bytes(b"broken")
                if kind == "xfs":
                    os.truncate(directory / "tmp" / "broken", 1 << 50)
            finally:
                unmount(directory)
        subprocess.run(
            ["debugfs", "-w", "-R", "set_inode_field /tmp/broken block[0] 0", made.pool / "ext4.raw"],
            check=True,
            capture_output=True,
        )
        make_ntfs(made.pool / "ntfs.raw", made.scratch / "fill-ntfs")
        make_fat(made.pool / "vfat.raw", made.scratch / "fill-vfat")
        yield made


def fill(root: Path) -> None:
    """Odd inodes in /tmp, in / and / itself, which the kernel shows."""
    (root / "tmp").mkdir()
    (root / "far directory").mkdir()
    (root / "far directory" / "inner").write_bytes(os.urandom(3000))
    for place in (root / "tmp", root):
        for name in SIBLINGS:
            (place / name).write_bytes(os.urandom(5000))
        (place / "far").write_bytes(os.urandom(70_000))
        os.setxattr(place / "far", "user.colour", b"green")
        (place / "far.link").symlink_to("far")
    (root / "tmp" / "epoch").write_bytes(b"1970")
    (root / "tmp" / "oldest").write_bytes(b"1901")
    for name, second in (("epoch", 0), ("oldest", -(1 << 31))):
        os.utime(root / "tmp" / name, (second, second))
    for path in ("tmp/far", "tmp/far.link", "far", "far.link", "far directory", "."):
        os.utime(root / path, ns=(FAR * 10**9 + 7, FAR * 10**9 + 123456789), follow_symlinks=False)


def make_ntfs(image: Path, directory: Path) -> None:
    """Two files whose records in the file table are damaged each in its way, and one of the year 3000."""
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    subprocess.run(["mkntfs", "-F", "-q", image], check=True, capture_output=True)
    directory.mkdir()
    mount_image("ntfs", image, directory, writable=True)
    try:
        for name in (*SIBLINGS, "far", "no record", "bad attribute"):
            (directory / name).write_bytes(name.encode() * 300)
        os.utime(directory / "far", (32_503_680_000, 32_503_680_000))
    finally:
        unmount(directory)
    content = image.read_bytes()
    with image.open("r+b") as file:
        for name, offset, damage in (("no record", 0, b"XXXX"), ("bad attribute", 0x3C, b"\xff\xff\xff\x7f")):
            found = content.find(name.encode("utf-16-le"), content.index(b"FILE0"))
            while content[found // 1024 * 1024 :][:4] != b"FILE":
                found = content.find(name.encode("utf-16-le"), found + 1)
            file.seek(found // 1024 * 1024 + offset)
            file.write(damage)


def make_fat(image: Path, directory: Path) -> None:
    """Files of days on which a wrong month shows."""
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.vfat", "-F", "32", image], check=True, capture_output=True)
    directory.mkdir()
    for name, second in (("january", 1_706_695_872), ("december", 1_735_639_872), ("a long name", 1_690_848_000)):
        (directory / name).write_bytes(name.encode())
        os.utime(directory / name, (second, second))
    subprocess.run(
        ["mcopy", "-m", "-i", image, *directory.iterdir(), "::/"], check=True, env={**os.environ, "TZ": "UTC"}
    )


@pytest.fixture(scope="module")
def snapshot(images: Images) -> Iterator[str]:
    with taken(images, "odd", "ext4.raw", "xfs.raw", "ntfs.raw", "vfat.raw") as name:
        yield name


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_odd_inodes_are_what_the_kernel_sees_and_their_siblings_too(images: Images, snapshot: str, kind: str) -> None:
    modified_ns, theirs = SEEN[kind]
    names = {name[4:].decode() for name in theirs if name.startswith(b"tmp/")} | {"broken"}
    tmp = f"{snapshot}:{kind}.raw/whole/tmp"
    shown = {one["name"]: one for one in images.json("ls", tmp)}
    assert set(shown) == names
    assert shown["far"]["mtime"] == "2300-01-01T00:00:00.123456+00:00"
    assert shown["broken"] == {"name": "broken", "damaged": True}
    assert "damaged broken" in images.cli("ls", tmp, check=True).stdout
    told = images.cli("find", f"{snapshot}:{kind}.raw", "--name", "[!b]*")
    for name in (*SIBLINGS, "far"):
        assert f"{kind}.raw/whole/tmp/{name}" in told.stdout.splitlines()
    assert f"damaged: {kind}.raw/whole/tmp/broken" in told.stderr
    assert told.returncode == 1
    assert images.cli("cat", f"{tmp}/epoch", check=True).stdout == "1970"
    assert images.cli("cat", f"{tmp}/broken").returncode == 1
    out = images.scratch / f"out-{kind}"
    places = [f"{snapshot}:{kind}.raw/whole/{name}" for name in ("tmp", "far", "far directory")]
    restored = images.cli("restore", *places, out)
    assert restored.returncode == 1
    assert "broken" in restored.stderr
    for name, said in described(out, posix=True).items():
        assert name == b"tmp" or said == theirs[name]
    with mounted(images, snapshot) as directory:
        root = directory / "files" / f"{kind}.raw" / "whole"
        ours = described(root, posix=True)
        assert {name: said for name, said in ours.items() if name != b"tmp"} == {
            name: said for name, said in theirs.items() if name != b"tmp"
        }
        assert root.stat().st_mtime_ns == modified_ns
        assert stat.S_ISDIR((root / "far directory").stat().st_mode)
        with pytest.raises(OSError, match="Input/output"):
            (root / "tmp" / "broken").stat()


def test_what_ntfs_has_lost_is_said_and_the_year_3000_shown(images: Images, snapshot: str) -> None:
    shown = {one["name"]: one for one in images.json("ls", f"{snapshot}:ntfs.raw/whole")}
    assert set(shown) == {*SIBLINGS, "far", "no record", "bad attribute"}
    assert {name for name, one in shown.items() if one.get("damaged")} == {"no record", "bad attribute"}
    assert shown["far"]["mtime"] == "3000-01-01T00:00:00+00:00"
    for name in (*SIBLINGS, "far"):
        assert images.cli("cat", f"{snapshot}:ntfs.raw/whole/{name}", check=True).stdout == name * 300
    assert images.cli("cat", f"{snapshot}:ntfs.raw/whole/no record").returncode == 1


def test_fat_s_times_are_those_that_were_written(images: Images, snapshot: str) -> None:
    shown = {one["name"]: one["mtime"] for one in images.json("ls", f"{snapshot}:vfat.raw/whole")}
    assert shown == {
        "january": "2024-01-31T10:11:12+00:00",
        "december": "2024-12-31T10:11:12+00:00",
        "a long name": "2023-08-01T00:00:00+00:00",
    }
