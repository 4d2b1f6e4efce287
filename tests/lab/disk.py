"""Guest disks: makes them, and reads them back by nothing of ours (the outside oracles).

The oracles use the kernel's own file system drivers on a loop mount, the kernel's hole map and
SHA-256. A file system in a snapshot may need its journal replayed, as after a power cut, which
writes: oracles mount a sparse copy and never touch the image itself.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tests.lab import state
from tests.lab.filesystems import Kind, make_filesystem, mount_loop, unmount

Format = Literal["raw", "qcow2"]

_EXT4_INCOMPAT_OFFSET = 1024 + 0x60
_EXT4_NEEDS_RECOVERY = 0x4


def create_disk(path: Path, size_bytes: int, filesystem: Kind | None = "ext4", disk_format: Format = "raw") -> Path:
    """Create a sparse disk, formatted as a whole (no partitions) or, with None, left blank."""
    raw = path if disk_format == "raw" else path.with_name(path.name + ".raw")
    if filesystem is None:
        with raw.open("wb") as file:
            file.truncate(size_bytes)
    else:
        make_filesystem(filesystem, raw, size_bytes)
    if disk_format != "raw":
        convert(raw, "raw", path, disk_format)
        raw.unlink()
    return path


def convert(source: Path, source_format: Format, target: Path, target_format: Format) -> None:
    """qemu-img convert; the result is sparse."""
    subprocess.run(["qemu-img", "convert", "-f", source_format, "-O", target_format, source, target], check=True)


def read_counter(image: Path, disk_format: Format = "raw") -> int:
    """The number that the guest's writer last wrote to this disk."""
    return int(read_file(image, "counter", disk_format))


def read_file(image: Path, path: str, disk_format: Format = "raw") -> bytes:
    """A file's content, from the file system that fills the whole disk."""
    with mounted(image, disk_format) as root:
        return (root / path.lstrip("/")).read_bytes()


@contextmanager
def mounted(image: Path, disk_format: Format = "raw", replay: bool = True) -> Iterator[Path]:
    """Mount a copy of a disk, as the kernel would find it after a power cut; yields the directory.

    With replay=False the image itself (raw only) is mounted read-only without journal replay.
    """
    scratch = Path(tempfile.mkdtemp(prefix="oracle-", dir=state.prepare()))
    directory, copy = scratch / "mnt", scratch / "copy.raw"
    directory.mkdir()
    try:
        if not replay:
            skip = "norecovery" if _kind(image) == "xfs" else "noload"
            _mount(image, directory, f"ro,{skip}")
        else:
            if disk_format == "raw":
                subprocess.run(["cp", "--sparse=always", "--reflink=auto", image, copy], check=True)
            else:
                convert(image, disk_format, copy, "raw")
            _mount(copy, directory, "rw")
        yield directory
    finally:
        unmount(directory)
        shutil.rmtree(scratch, ignore_errors=True)


def needs_recovery(image: Path) -> bool:
    """Whether an ext4 raw image has an unreplayed journal: False if it was cut frozen or unmounted."""
    with image.open("rb") as file:
        file.seek(_EXT4_INCOMPAT_OFFSET)
        return bool(int.from_bytes(file.read(4), "little") & _EXT4_NEEDS_RECOVERY)


def sha256(path: Path) -> str:
    """SHA-256 of a file's whole content, holes as zeros."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def allocated_ranges(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of everything that is not a hole, from the kernel (SEEK_DATA, SEEK_HOLE)."""
    ranges = []
    with path.open("rb") as file:
        end, offset = os.fstat(file.fileno()).st_size, 0
        while offset < end:
            try:
                start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:
                break  # ENXIO: only a hole is left
            offset = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            ranges.append((start, offset - start))
    return ranges


def _mount(image: Path, directory: Path, options: str) -> None:
    kind = _kind(image)
    if kind == "xfs":
        options += ",nouuid"  # two copies of one file system may be mounted at once
    mount_loop(image, directory, kind, options)


def _kind(image: Path) -> Kind:
    with image.open("rb") as file:
        return "xfs" if file.read(4) == b"XFSB" else "ext4"
