"""Disk images full of files of every kind, and what a directory tree is, said so that two trees can be compared.

The kernel (or ntfs-3g, mtools) writes the images; Frostgate reads them. Everything is derived from a fixed seed.
"""

import hashlib
import os
import random
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Literal

from tests.lab.filesystems import make_filesystem, mount_loop, unmount

Kind = Literal["ext2", "ext3", "ext4", "xfs", "ntfs", "vfat"]
_ACCESS_LIST = bytes.fromhex(
    "0200000001000600ffffffff02000700e803000004000400ffffffff10000700ffffffff20000400ffffffff"
)  # user::rw-, user:1000:rwx, group::r--, mask::rwx, other::r--
POSIX = ("ext2", "ext3", "ext4", "xfs")


def fill(root: Path, files: int, *, posix: bool) -> None:
    """Write files of odd sizes and names, with holes, and for POSIX links, attributes, modes, owners and nodes."""
    chance = random.Random(7)
    directories = [os.fsencode(root)]
    for number in range(files // 40):
        directories.append(chance.choice(directories[-30:]) + b"/dir %d" % number)
        os.mkdir(directories[-1])
    for number in range(files):
        name = chance.choice(
            [
                b"file%d" % number,
                "naïve-日本-".encode() + b"%d" % number,
                b"sp ace %d.txt" % number,
                b"bad\xff\xfe%d" % number if posix else b"plain%d" % number,
                b"x" * 200 + b"%d" % number,
            ]
        )
        path = chance.choice(directories) + b"/" + name
        with open(path, "wb") as file:
            file.write(chance.randbytes(chance.choice([0, 1, 13, 4095, 4096, 4097, chance.randrange(1, 70000)])))
            if number % 97 == 0:
                file.seek(1_000_000, os.SEEK_CUR)
                file.write(b"end")
            if number % 101 == 0:
                file.truncate(file.tell() + 5_000_000)
        if posix:
            _dress(path, number, chance)


def _dress(path: bytes, number: int, chance: random.Random) -> None:
    os.chown(path, number % 70_000, number * 7 % 70_000)
    os.chmod(path, chance.choice([0o644, 0o600, 0o4755, 0o2755, 0o1777, 0o000]))
    if number % 50 == 0:
        os.setxattr(path, b"user.k%d" % number, chance.randbytes(20))
        os.setxattr(path, b"user.outside the inode", chance.randbytes(700 + number % 1000))
        os.setxattr(path, b"system.posix_acl_access", _ACCESS_LIST)
    if number % 60 == 0:
        os.symlink(chance.choice([b"/etc/passwd", b"../x", b"file", b"t" * 100, b"lat\xefn-1"]), path + b".ln")
    if number % 70 == 0:
        os.link(path, path + b".hard")
    if number % 500 == 0:
        os.mkfifo(path + b".fifo")
        os.mknod(path + b".dev", 0o600 | stat.S_IFBLK, os.makedev(7, 1))
    os.utime(path, ns=(number * 10**12 + number, 1_500_000_000 * 10**9 + number * 10**9 + 123456789))


def make_image(kind: Kind, image: Path, size_bytes: int, files: int) -> Path:
    """Make an image that is one file system, filled; returns the image."""
    if kind in ("ext4", "xfs"):
        make_filesystem(kind, image, size_bytes)  # type: ignore[arg-type]
    else:
        with image.open("wb") as file:
            file.truncate(size_bytes)
        tool = {"ntfs": ["mkntfs", "-F", "-q"], "vfat": ["mkfs.vfat", "-F", "32"]}.get(kind, [f"mkfs.{kind}", "-q"])
        subprocess.run([*tool, image], check=True, capture_output=True)
    directory = image.with_name(image.name + ".mnt")
    directory.mkdir()
    if kind == "vfat":
        fill(directory, files, posix=False)
        subprocess.run(["mcopy", "-s", "-i", image, *sorted(directory.iterdir()), "::/"], check=True)
        shutil.rmtree(directory)
        return image
    mount_image(kind, image, directory, writable=True)
    try:
        fill(directory, files, posix=kind in POSIX)
    finally:
        unmount(directory)
        directory.rmdir()
    return image


def crowd(kind: Kind, image: Path, entries: int) -> Path:
    """Make an image with a directory of many empty files; returns the image."""
    with image.open("wb") as file:
        file.truncate(1 << 30)
    subprocess.run([f"mkfs.{kind}", "-q", *(["-N", str(entries + 1000)] if kind == "ext4" else []), image], check=True)
    directory = image.with_name(image.name + ".mnt")
    directory.mkdir()
    mount_image(kind, image, directory, writable=True)
    try:
        (directory / "crowd").mkdir()
        for number in range(entries):
            os.mknod(directory / "crowd" / f"entry {number:06}")
    finally:
        unmount(directory)
        directory.rmdir()
    return image


def mount_image(kind: Kind, image: Path, directory: Path, *, writable: bool = False) -> None:
    """Mount an image by the kernel, NTFS by ntfs-3g."""
    how = "rw" if writable else "ro"
    if kind == "ntfs":
        loop = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
        device = loop.stdout.strip()
        try:
            subprocess.run(["ntfs-3g", "-o", how, device, directory], check=True)
        finally:
            subprocess.run(["losetup", "--detach", device], check=True)  # once it is unmounted
        return
    mount_loop(image, directory, kind, how + (",norecovery,nouuid" if kind == "xfs" and not writable else ""))


def described(root: Path, *, posix: bool) -> dict[bytes, tuple[object, ...]]:
    """Return every path below a directory with all that can be seen of it; contents as their SHA-256."""
    top = os.fsencode(root)
    found = {}
    for directory, directories, files in os.walk(top):
        for name in directories + files:
            path = os.path.join(directory, name)
            found[path[len(top) + 1 :]] = _described(path, posix=posix)
    return found


def _described(path: bytes, *, posix: bool) -> tuple[object, ...]:
    status = os.lstat(path)
    seen: list[object] = [stat.S_IFMT(status.st_mode)]
    if posix:
        seen += [oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, status.st_rdev]
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            seen += [status.st_size, hashlib.file_digest(file, "sha256").hexdigest()]
        if posix:
            attributes = tuple(sorted((name, os.getxattr(path, name)) for name in os.listxattr(path)))
            seen += [status.st_nlink, attributes]
    elif stat.S_ISLNK(status.st_mode):
        seen.append(os.readlink(path))
    return tuple(seen)
