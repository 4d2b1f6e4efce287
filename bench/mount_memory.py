"""Resident memory of a mount, its gateway and its parser, while a tree of 10 GiB is read through it.

The tree is on an ext4 image, read by `tar`: once the image is a raw file, which the parser reads itself, and once it
is qcow2, whose bytes come through the gateway and the mount. The greatest of what is seen every 50 ms.
"""

import subprocess
import tempfile
import threading
from pathlib import Path

import psutil

from bench.mount_raw import mounted
from tests.gateway_process import GatewayProcess
from tests.lab import state
from tests.lab.disk import convert
from tests.lab.filesystems import mount_filesystem, unmount
from tests.lab.images import make_image, mount_image

MIB = 1 << 20
GIB = 1 << 30
TREE = 10 * GIB
FILE = 256 * MIB


def main() -> None:
    """Measure and print."""
    lab = state.prepare()
    try:
        with mount_filesystem("xfs", lab / "bench-memory", 40 * GIB) as filesystem:
            pool = filesystem.directory
            image = make_image("ext4", pool / "a.raw", TREE + 1536 * MIB, 1000)
            fill(image, lab / "bench-fill")
            convert(image, "raw", pool / "a.qcow2", "qcow2")
            with GatewayProcess(
                Path(tempfile.mkdtemp(prefix="bench-gateway-")), {"p": {"kind": "nfs", "root": str(pool)}}
            ) as gateway:
                gateway.cli("snapshot", "create", "s", "p/a.raw", "p/a.qcow2", check=True)
                print(f"{'resident memory, MiB, while 10 GiB are read':46} {'mount':>6} {'parser':>6} {'gateway':>7}")
                for volume in ("a.raw", "a.qcow2"):
                    with mounted(gateway, lab / "bench-m") as (pid, _):
                        seen = greatest(lab / "bench-m" / "files" / volume, pid, gateway.pid)
                        print(f"{volume:46} {seen[0]:>6} {seen[1]:>6} {seen[2]:>7}", flush=True)
    finally:
        state.release()


def fill(image: Path, place: Path) -> None:
    """Put files of TREE bytes in all into an image: real bytes, the same ones in every file."""
    place.mkdir(exist_ok=True)
    mount_image("ext4", image, place, writable=True)
    try:
        first = place / "big-0"
        words = ["dd", "if=/dev/urandom", f"of={first}", "bs=1M", f"count={FILE // MIB}", "status=none"]
        subprocess.run(words, check=True)
        for number in range(1, TREE // FILE):
            subprocess.run(["cp", "--reflink=never", first, place / f"big-{number}"], check=True)
    finally:
        unmount(place)


def greatest(tree: Path, mount: int, gateway: int) -> tuple[int, int, int]:
    """Return the most that each of the processes had while the tree was read, in MiB."""
    most = [0, 0, 0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            process = psutil.Process(mount)
            parsers = [child.memory_info().rss for child in process.children()]
            now = (process.memory_info().rss, max(parsers, default=0), psutil.Process(gateway).memory_info().rss)
            most[:] = [max(before, seen) for before, seen in zip(most, now, strict=True)]

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        read = f"tar cf - '{tree}' 2>/dev/null | wc -c"
        told = subprocess.run(["bash", "-c", read], capture_output=True, check=True)
        assert int(told.stdout) > TREE, told.stdout
    finally:
        done.set()
        watching.join()
    return most[0] // MIB, most[1] // MIB, most[2] // MIB


if __name__ == "__main__":
    main()
