"""An image on Ceph, 512 MiB: our mount of its snapshot beside `rbd-fuse` of the image itself.

A one-node cluster in memory; read in order, and 4 KiB at random by one reader (fio) and by 16, nothing in the page
cache. The 16 are forks that share an open file: rbd-fuse fails some of the opens that fio's jobs make at once. In turn
in every round, in one session; medians.
"""

import os
import random
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.mount_raw import at_random, cold, in_order, mounted
from tests.gateway_process import GatewayProcess
from tests.lab import state
from tests.lab.ceph import CephCluster

MIB = 1 << 20
SIZE = 512 * MIB
ROUNDS = 3
READ_S = 3


def main() -> None:
    """Measure and print."""
    lab = state.prepare()
    try:
        with CephCluster("ceph-bench", manager=False) as cluster:
            cluster.pool("vms")
            cluster.client("frostgate", "vms")
            content = lab / "bench-content"
            with content.open("wb") as file:
                for _ in range(SIZE // MIB):
                    file.write(os.urandom(MIB))
            cluster.rbd("import", "--no-progress", content, "vms/a")
            content.unlink()
            pools = {"p": {"kind": "ceph", "conf": str(cluster.conf), "rbd_pool": "vms"}}
            with GatewayProcess(Path(tempfile.mkdtemp(prefix="bench-gateway-")), pools) as gateway:
                gateway.cli("snapshot", "create", "s", "p/a", check=True)
                with (
                    mounted(gateway, lab / "bench-rbd-ours") as (pid, ours),
                    exported(cluster, lab / "bench-rbd-fuse") as peer,
                ):
                    report({"rbd-fuse": peer, "ours": (pid, ours)})
    finally:
        state.release()


@contextmanager
def exported(cluster: CephCluster, directory: Path) -> Iterator[tuple[int, Path]]:
    """Yield rbd-fuse: its process and the image."""
    directory.mkdir(exist_ok=True)
    process = subprocess.Popen(["rbd-fuse", "-c", cluster.conf, "-p", "vms", "-f", directory])
    try:
        while not os.path.ismount(directory):
            time.sleep(0.05)
        yield process.pid, directory / "a"
    finally:
        process.terminate()
        process.wait()


def report(places: dict[str, tuple[int, Path]]) -> None:
    """Measure both and print."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for name, (pid, path) in places.items():
            found["in order, MiB/s", name].append(in_order(path, SIZE))
            found["4 KiB, 1 reader, IOPS", name].append(at_random(path, 1, pid, None)[0])
            found["4 KiB, 16 readers, IOPS", name].append(together(path, 16))
    print(f"{'member on Ceph':24} {'rbd-fuse':>9} {'ours':>9} {'ours/rbd-fuse':>14}")
    for key in dict.fromkeys(key for key, _ in found):
        peer, ours = (statistics.median(found[key, name]) for name in ("rbd-fuse", "ours"))
        print(f"{key:24} {peer:>9.0f} {ours:>9.0f} {ours / peer:>14.2f}", flush=True)


def together(path: Path, readers: int) -> float:
    """Return reads a second of so many processes that read through one open file."""
    cold()
    descriptor = os.open(path, os.O_RDONLY)
    pipes = []
    for number in range(readers):
        read, write = os.pipe()
        if not os.fork():
            os.write(write, str(reads(descriptor, number)).encode())
            os._exit(0)
        os.close(write)
        pipes.append(read)
    total = 0
    for read in pipes:
        total += int(os.read(read, 20))
        os.close(read)
        os.wait()
    os.close(descriptor)
    return total / READ_S


def reads(descriptor: int, seed: int) -> int:
    """Return how many reads one process does in READ_S."""
    chance = random.Random(seed)
    end = time.monotonic() + READ_S
    count = 0
    while time.monotonic() < end:
        os.pread(descriptor, 4096, chance.randrange(SIZE // 4096) * 4096)
        count += 1
    return count


if __name__ == "__main__":
    main()
