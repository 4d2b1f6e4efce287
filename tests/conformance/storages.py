"""What the suite needs of a storage beside the gateway: to make volumes, and to look at them by nothing of ours.

A new provider adds one such class and its name to STORAGES (conftest.py); it adds no test here. What only files can
be or do is tested of the file storages alone (FILES).
"""

import errno
import hashlib
import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.lab.disk import allocated_ranges, convert, sha256
from tests.lab.filesystems import Kind, MountedFilesystem, mount_filesystem

MIB = 1 << 20
GIB = 1 << 30


class Storage(ABC):
    """One storage with the pools "main", "other" and "small" (320 MiB)."""

    name: str
    clones: bool
    """A cut is instant, also of volumes in use; otherwise such a volume is refused."""

    clones_volumes = False
    """CloneGroupSnapshot works."""

    compares = False
    """ListChangedExtents works."""

    @abstractmethod
    def start(self, directory: Path) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def pools(self) -> dict[str, dict[str, Any]]:
        """The pools' tables in the configuration."""

    @abstractmethod
    def create(self, volume: str, size: int = 4 * MIB, pool: str = "main", image_format: str = "raw") -> None:
        """A volume of zeros, sparse."""

    @abstractmethod
    def write(self, volume: str, offset: int, data: bytes, pool: str = "main") -> None:
        """As a guest that syncs would."""

    @abstractmethod
    def remove(self, volume: str, pool: str = "main") -> None: ...

    @abstractmethod
    def replace(self, volume: str, pool: str = "main") -> None:
        """Make it another volume of the same name."""

    @abstractmethod
    def resize(self, volume: str, size: int, pool: str = "main") -> None: ...

    @abstractmethod
    def digest(self, volume: str, pool: str = "main") -> str:
        """SHA-256 of the volume."""

    @abstractmethod
    def member_digest(self, group: str, volume: str, pool: str = "main") -> str:
        """SHA-256 of a member, past the gateway."""

    @abstractmethod
    def member_ranges(self, group: str, volume: str, pool: str = "main") -> list[tuple[int, int]]:
        """What of a member is not a hole."""

    @abstractmethod
    def ranges(self, volume: str, pool: str = "main") -> list[tuple[int, int]]:
        """What of a volume is not a hole."""

    @abstractmethod
    def exists(self, group: str, pool: str = "main") -> bool:
        """Whether the storage has anything of a group, finished or not."""

    @abstractmethod
    def source(self, volume: str, pool: str = "main") -> dict[str, Any]:
        """The volume as a DiskSource's arguments."""

    @abstractmethod
    def damage(self, group: str, pool: str = "main") -> None:
        """Lose a group's members behind the gateway's back."""

    def is_dependent(self, volume: str, pool: str = "main") -> bool:
        """Whether a clone needs the snapshot it was made from."""
        return False

    def make_independent(self, volume: str, pool: str = "main") -> None:
        """What an operator does so that a volume needs no snapshot any more."""

    @abstractmethod
    def in_use(self, volume: str, pool: str = "main") -> Any:
        """Context in which QEMU has the volume open for writing; yields a word by which it has to be named."""

    @abstractmethod
    def full(self, pool: str = "small") -> Any:
        """Context in which the pool has no room."""

    @abstractmethod
    def away(self, pool: str = "other") -> Any:
        """Context in which the pool does not answer."""


class Directory(Storage):
    """The nfs provider on a file system of the kernel."""

    clones_volumes = True
    compares = True

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.name = f"nfs-{kind}"
        self.clones = kind == "xfs"
        self._mounts: list[MountedFilesystem] = []

    def start(self, directory: Path) -> None:
        self._directory = directory
        self._mounts = [
            mount_filesystem(self.kind, directory / "big", 4 * GIB),
            mount_filesystem(self.kind, directory / "small", 320 * MIB),
        ]
        for pool in ("main", "other"):
            (directory / "big" / pool).mkdir()

    def stop(self) -> None:
        for mount in self._mounts:
            mount.unmount()

    def root(self, pool: str) -> Path:
        return self._directory / "small" if pool == "small" else self._directory / "big" / pool

    def pools(self) -> dict[str, dict[str, Any]]:
        tables: dict[str, dict[str, Any]] = {
            pool: {"kind": "nfs", "root": str(self.root(pool))} for pool in ("main", "other", "small")
        }
        tables["main"]["hypervisor_paths"] = ["/mnt/as-the-hypervisor-sees-it"]
        return tables

    def create(self, volume: str, size: int = 4 * MIB, pool: str = "main", image_format: str = "raw") -> None:
        path = self.root(pool) / volume
        if image_format == "qcow2":
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)
            return
        with path.open("wb") as file:
            file.truncate(size)

    def write(self, volume: str, offset: int, data: bytes, pool: str = "main") -> None:
        with (self.root(pool) / volume).open("r+b") as file:
            file.seek(offset)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def remove(self, volume: str, pool: str = "main") -> None:
        (self.root(pool) / volume).unlink()

    def replace(self, volume: str, pool: str = "main") -> None:
        path = self.root(pool) / volume
        new = path.with_name(".new")
        new.write_bytes(b"another volume" + bytes(path.stat().st_size - 14))
        new.rename(path)

    def resize(self, volume: str, size: int, pool: str = "main") -> None:
        os.truncate(self.root(pool) / volume, size)

    def digest(self, volume: str, pool: str = "main") -> str:
        return sha256(self.root(pool) / volume)

    def member(self, group: str, volume: str, pool: str = "main") -> Path:
        return self.root(pool) / ".frostgate" / group / volume

    def member_digest(self, group: str, volume: str, pool: str = "main") -> str:
        return sha256(self.member(group, volume, pool))

    def member_ranges(self, group: str, volume: str, pool: str = "main") -> list[tuple[int, int]]:
        return allocated_ranges(self.member(group, volume, pool))

    def ranges(self, volume: str, pool: str = "main") -> list[tuple[int, int]]:
        return allocated_ranges(self.root(pool) / volume)

    def exists(self, group: str, pool: str = "main") -> bool:
        return (self.root(pool) / ".frostgate" / group).exists()

    def source(self, volume: str, pool: str = "main") -> dict[str, Any]:
        return {"file": str(self.root(pool) / volume)}

    def damage(self, group: str, pool: str = "main") -> None:
        subprocess.run(["rm", "-r", self.root(pool) / ".frostgate" / group], check=True)

    @contextmanager
    def in_use(self, volume: str, pool: str = "main") -> Iterator[str]:
        with open_in_qemu(self.root(pool) / volume, self._directory / "qsd.sock") as pid:
            yield str(pid)

    @contextmanager
    def full(self, pool: str = "small") -> Iterator[None]:
        filler = self.root(pool) / ".filler"
        with filler.open("wb", buffering=0) as file:
            size = MIB
            while size >= 4096:
                try:
                    file.write(b"x" * size)
                    os.fsync(file.fileno())
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2
        try:
            yield
        finally:
            filler.unlink()

    @contextmanager
    def away(self, pool: str = "other") -> Iterator[None]:
        root = self.root(pool)
        hidden = root.with_name(root.name + ".away")
        root.rename(hidden)
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                root.rmdir()
            hidden.rename(root)


@contextmanager
def open_in_qemu(image: Path, socket: Path) -> Iterator[int]:
    """Have qemu-storage-daemon open an image for writing, which locks it as a VM does; yields its process id."""
    pid_file = socket.with_name(socket.name + ".pid")  # written once everything is open
    process = subprocess.Popen(
        [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=disk,filename={image}"),
            *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
            *("--export", "type=nbd,id=e,node-name=disk,writable=on"),
            *("--pidfile", pid_file),
        ]
    )
    try:
        deadline = time.monotonic() + 60
        while not pid_file.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait()
        for file in (socket, pid_file):
            file.unlink(missing_ok=True)


def guest_view(image: Path, image_format: str, scratch: Path) -> str:
    """SHA-256 of an image's content as a guest sees it, by qemu-img."""
    if image_format == "raw":
        return sha256(image)
    convert(image, "qcow2", scratch, "raw")
    return hashlib.sha256(scratch.read_bytes()).hexdigest()
