"""Does a cut depend on the size of the volume? 1 GiB and 16 GiB files of real, allocated blocks, in turn."""

import os
import statistics
import subprocess
import sys

from clients.gateway import Endpoint, Gateway
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from frostgate.v1 import volume_pb2
from tests.gateway_process import GatewayProcess
from tests.lab import leftovers, state
from tests.lab.filesystems import mount_filesystem

GIB = 1 << 30
ROUNDS = 31


def main() -> int:
    """Print medians and the ratio, and how long a copy of the small one takes (the peer)."""
    lab = state.prepare()
    try:
        with (
            mount_filesystem("xfs", lab / "bench-pool", 24 * GIB) as pool,
            GatewayProcess(lab / "bench", {"fast": {"kind": "nfs", "root": str(pool.directory)}}) as process,
            Gateway(Endpoint(process.address)) as gateway,
        ):
            cuts: dict[str, list[float]] = {"1": [], "16": []}
            for size in cuts:
                with (pool.directory / f"{size}.raw").open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, int(size) * GIB)
            for number in range(ROUNDS):
                for size, figures in cuts.items():
                    figures.append(cut(gateway, f"n{number}-{size}", f"{size}.raw"))
            small, large = (statistics.median(figures) for figures in cuts.values())
            print(f"cut of 1 GiB {small:.2f} ms, of 16 GiB {large:.2f} ms (allocated by fallocate), ", end="")
            print(f"ratio {large / small:.2f}; medians of {ROUNDS}")
            subprocess.run(["sync"], check=True)
    finally:
        leftovers.remove(state.DEFAULT_STATE_DIR)
    return 0


def cut(gateway: Gateway, group: str, volume: str) -> float:
    """Milliseconds that the storage took to cut a volume."""
    ref = volume_pb2.VolumeRef(pool="fast", volume=volume)
    spec = pb.GroupSnapshotSpec(volumes=[pb.VolumeSpec(ref=ref)])
    gateway.call("PrepareGroupSnapshot", rpc.PrepareGroupSnapshotRequest(id=group, spec=spec))
    taken = gateway.call("CreateGroupSnapshot", rpc.CreateGroupSnapshotRequest(id=group)).group_snapshot
    gateway.delete(group)
    return float(taken.cut_duration.ToNanoseconds()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
