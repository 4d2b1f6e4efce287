"""What the gateway itself costs: CreateGroupSnapshot as the caller sees it, less the storage's own time.

Real volumes of 1 MiB on XFS, prepared before; 1 and 64 callers. Beside it the disk's own fsync, without which
no answer is durable.
"""

import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clients.gateway import Endpoint, Gateway
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from frostgate.v1 import volume_pb2
from tests.gateway_process import GatewayProcess
from tests.lab import leftovers, state
from tests.lab.filesystems import mount_filesystem

MIB = 1 << 20


def main() -> int:
    """Print one line a number of callers."""
    lab = state.prepare()
    try:
        with (
            mount_filesystem("xfs", lab / "bench-pool", 4096 * MIB) as pool,
            GatewayProcess(lab / "bench", {"fast": {"kind": "nfs", "root": str(pool.directory)}}) as process,
            Gateway(Endpoint(process.address)) as gateway,
        ):
            for number in range(64):
                (pool.directory / f"v{number}.raw").write_bytes(b"v" * MIB)
            print(f"fsync of the journal's disk: median {fsync(lab / 'bench'):.2f} ms")
            print(f"{'callers':>7} {'Create':>8} {'storage':>8} {'gateway median':>15} {'gateway p99':>12}   (ms)")
            for callers, rounds in ((1, 200), (64, 8)):
                measure(gateway, callers, rounds)
    finally:
        leftovers.remove(state.DEFAULT_STATE_DIR)
    return 0


def measure(gateway: Gateway, callers: int, rounds: int) -> None:
    """Let callers cut at the same time, so many rounds; each on a volume of its own."""
    figures: list[tuple[float, float]] = []
    with ThreadPoolExecutor(callers) as pool:
        for turn in range(rounds):
            groups = [(f"c{callers}-{turn}-{caller}", f"v{caller}.raw") for caller in range(callers)]
            list(pool.map(lambda group: prepare(gateway, *group), groups))
            figures += pool.map(lambda group: create(gateway, group[0]), groups)
            list(pool.map(lambda group: gateway.delete(group[0]), groups))
    cost = sorted(total - storage for total, storage in figures)
    total, storage = (statistics.median(column) for column in zip(*figures, strict=True))
    p99 = cost[min(len(cost) - 1, int(len(cost) * 0.99))]
    print(f"{callers:>7} {total:>8.2f} {storage:>8.2f} {statistics.median(cost):>15.2f} {p99:>12.2f}", flush=True)


def prepare(gateway: Gateway, group: str, volume: str) -> None:
    """Reserve."""
    ref = volume_pb2.VolumeRef(pool="fast", volume=volume)
    spec = pb.GroupSnapshotSpec(volumes=[pb.VolumeSpec(ref=ref)])
    gateway.call("PrepareGroupSnapshot", rpc.PrepareGroupSnapshotRequest(id=group, spec=spec))


def create(gateway: Gateway, group: str) -> tuple[float, float]:
    """Milliseconds of the call, and of the storage in it."""
    began = time.monotonic()
    taken = gateway.call("CreateGroupSnapshot", rpc.CreateGroupSnapshotRequest(id=group)).group_snapshot
    return (time.monotonic() - began) * 1000, taken.cut_duration.ToNanoseconds() / 1e6


def fsync(directory: Path) -> float:
    """Milliseconds of an fsync of 4 KiB in a directory, median of 50."""
    took = []
    with (directory / "fsync").open("wb", buffering=0) as file:
        for _ in range(50):
            file.write(b"f" * 4096)
            began = time.monotonic()
            os.fsync(file.fileno())
            took.append((time.monotonic() - began) * 1000)
    return statistics.median(took)


if __name__ == "__main__":
    sys.exit(main())
