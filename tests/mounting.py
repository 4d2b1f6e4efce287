"""What the tests of mounting share: a pool with images, snapshots of them, mounts of ours and of the kernel."""

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.gateway_process import GatewayProcess
from tests.lab import state
from tests.lab.filesystems import mount_filesystem, unmount
from tests.lab.images import Kind, mount_image

MIB = 1 << 20


@dataclass(frozen=True)
class Images:
    """A gateway over a pool "p" that is a directory on XFS."""

    gateway: GatewayProcess
    pool: Path
    scratch: Path

    def cli(self, *words: str | Path, **keywords):  # type: ignore[no-untyped-def]
        """Run `frostgate`."""
        return self.gateway.cli(*words, **keywords)

    def json(self, *words: str | Path):  # type: ignore[no-untyped-def]
        """What a command prints for programs."""
        return json.loads(self.cli(*words, "--output", "json", check=True).stdout)


@contextmanager
def image_pool(scratch: Path, name: str, size_bytes: int = 8192 * MIB) -> Iterator[Images]:
    """Make an empty pool."""
    lab = state.prepare()
    with (
        mount_filesystem("xfs", lab / name, size_bytes) as filesystem,
        GatewayProcess(
            scratch / "gateway", {"p": {"kind": "nfs", "root": str(filesystem.directory)}}, cut_timeout_s=120
        ) as gateway,
    ):
        yield Images(gateway, filesystem.directory, scratch)
    state.release()


@contextmanager
def taken(images: Images, snapshot: str, *volumes: str) -> Iterator[str]:
    """Take a snapshot of volumes of the pool; it is deleted at the end."""
    os.sync()  # a clone waits for what is not on the disk yet, and images were written just now
    images.cli("snapshot", "create", snapshot, *(f"p/{volume}" for volume in volumes), check=True)
    yield snapshot
    images.cli("snapshot", "delete", snapshot, "--yes", check=True)


@contextmanager
def mounted(images: Images, *words: str | Path) -> Iterator[Path]:
    """`frostgate mount`; yields the directory."""
    directory = images.scratch / f"mnt{time.monotonic_ns()}"
    serving = psutil.Process(images.json("mount", *words, directory)["pid"])
    try:
        yield directory
    finally:
        images.cli("umount", "--lazy", directory)
        serving.wait(120)  # it has the members open until then


@contextmanager
def over_tcp(images: Images) -> Iterator[str]:
    """The gateway's address as seen from another host: a port that leads to its unix socket."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(1 << 16):
                target.sendall(content)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(images.gateway.address.removeprefix("unix:"))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=copy, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


@contextmanager
def kernel(images: Images, kind: Kind, image: Path | None = None) -> Iterator[Path]:
    """The kernel's own mount of an image; <kind>.raw of the pool if none is given."""
    directory = images.scratch / f"kernel-{kind}"
    directory.mkdir()
    try:
        mount_image(kind, image or images.pool / f"{kind}.raw", directory)
        yield directory
    finally:
        unmount(directory)
        directory.rmdir()


def parsers_of(directory: Path) -> list[psutil.Process]:
    """The parsers of the process that serves a mount, which has its place in its command line."""
    servers = [one for one in psutil.process_iter(["cmdline"]) if str(directory) in (one.info["cmdline"] or ())]
    return [child for one in servers for child in one.children() if "clients.files.worker" in child.cmdline()]


def comparable(tree: dict[bytes, tuple[object, ...]]) -> dict[bytes, tuple[object, ...]]:
    """Without the targets of links that are shown elsewhere than the guest wrote, so that they stay in the tree.

    Of those that images.fill() makes they are /etc/passwd and ../x.
    """

    def moved(one: tuple[object, ...]) -> bool:
        return one[0] == stat.S_IFLNK and isinstance(one[-1], bytes) and (b"/" in one[-1] or one[-1] == b"x")

    return {name: one[:-1] if moved(one) else one for name, one in tree.items()}
