"""Real file systems of any size for pools: a sparse image on a loop device.

The image lies beside the mount point (<directory>.img). The loop device is freed by the kernel
when the mount goes (autoclear). Below the lab's state directory `python -m tests.lab down` removes
what a killed test left, and only there does a hypervisor that already runs see the mount.
"""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

Kind = Literal["xfs", "ext4"]

# mkfs.xfs refuses less than 300 MB unless it believes that it runs in its own test suite.
_SMALL_XFS = {"TEST_DIR": "1", "TEST_DEV": "1", "QA_CHECK_FS": "1"}


@dataclass(frozen=True)
class MountedFilesystem:
    """A mounted loop file system; leaving its `with` block unmounts it and deletes the image."""

    kind: Kind
    directory: Path
    image: Path

    def unmount(self) -> None:
        """Unmount and delete image and mount point. Repeatable."""
        unmount(self.directory)
        self.image.unlink(missing_ok=True)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unmount()


def mount_filesystem(kind: Kind, directory: Path, size_bytes: int) -> MountedFilesystem:
    """Make a file system in a new sparse image and mount it; XFS with reflinks, ext4 has none."""
    directory.mkdir(parents=True, exist_ok=True)
    image = directory.with_name(directory.name + ".img")
    make_filesystem(kind, image, size_bytes)
    mount_loop(image, directory, kind)
    return MountedFilesystem(kind, directory, image)


def mount_loop(image: Path, directory: Path, kind: str = "auto", options: str = "rw", patience_s: float = 30) -> None:
    """Mount an image by a loop device. Raises RuntimeError with mount's words.

    Of two that look for a free device at the same time, one may be told that it is busy, or find it gone: there is a
    lab for each of pytest's workers. It tries again.
    """
    deadline = time.monotonic() + patience_s
    while True:
        command = ["mount", "-t", kind, "-o", f"loop,{options}", image, directory]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode:
            return
        if "loop device" not in done.stderr or time.monotonic() > deadline:
            raise RuntimeError(f"{image} is not mounted: {done.stderr.strip()}")
        time.sleep(0.2)


def make_filesystem(kind: Kind, image: Path, size_bytes: int) -> None:
    """Format a new sparse file, leaving no lazy initialisation to the kernel that mounts it."""
    with image.open("wb") as file:
        file.truncate(size_bytes)
    if kind == "xfs":
        command = ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"]
    else:
        command = ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-i", "65536"]
    environment = {**os.environ, **_SMALL_XFS} if kind == "xfs" else None
    subprocess.run([*command, image], check=True, env=environment, stdout=subprocess.DEVNULL)


def unmount(directory: Path, patience_s: float = 5.0) -> None:
    """Unmount; waits for the last user, then detaches it lazily. Harmless when not mounted."""
    deadline = time.monotonic() + patience_s
    while os.path.ismount(directory):
        if subprocess.run(["umount", directory], check=False, capture_output=True).returncode == 0:
            continue
        if time.monotonic() > deadline:
            subprocess.run(["umount", "--lazy", directory], check=True)
            return
        time.sleep(0.1)
