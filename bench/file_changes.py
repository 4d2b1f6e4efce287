"""What changed in a file, and a clone of it: 2 GiB of data, 1 % of it written anew, on XFS; beside cmp and cp."""

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from clients.gateway import Endpoint, Gateway
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from frostgate.v1 import volume_pb2
from tests.gateway_process import GatewayProcess
from tests.lab import leftovers, state
from tests.lab.filesystems import mount_filesystem

GIB, PART = 1 << 30, 64 * 1024
SIZE = 2 * GIB
ROUNDS = 5


def main() -> int:
    """Print medians of ours and of the peers, for raw and qcow2."""
    lab = state.prepare()
    try:
        with (
            mount_filesystem("xfs", lab / "bench-pool", 16 * GIB) as pool,
            GatewayProcess(lab / "bench", {"fast": {"kind": "nfs", "root": str(pool.directory)}}) as process,
            Gateway(Endpoint(process.address)) as gateway,
        ):
            for name in ("disk.raw", "disk.qcow2"):
                measure(gateway, pool.directory, name)
    finally:
        leftovers.remove(state.DEFAULT_STATE_DIR)
    return 0


def measure(gateway: Gateway, directory: Path, name: str) -> None:
    """One format."""
    chance, path = random.Random(3), directory / name
    image_format = name.rpartition(".")[2]
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, path, str(SIZE)], check=True)
    change(path, image_format, [(offset, 8 << 20) for offset in range(0, SIZE, 8 << 20)], chance)
    take(gateway, f"old-{image_format}", name)
    parts = sorted(chance.sample(range(SIZE // PART), SIZE // PART // 100))
    change(path, image_format, [(part * PART, PART) for part in parts], chance)
    take(gateway, f"new-{image_format}", name)
    member = directory / ".frostgate" / f"new-{image_format}" / name

    def extents(*, coarse: bool) -> int:
        request = rpc.ListChangedExtentsRequest(
            id=f"new-{image_format}", volume=ref(name), base_id=f"old-{image_format}", coarse=coarse
        )
        answers = gateway.stream("ListChangedExtents", request)
        return sum(extent.length for answer in answers for extent in answer.extents)

    clones = iter(range(1000))

    def clone() -> None:
        spec = rpc.CloneSpec(source=ref(name), target_volume=f"c{next(clones)}.{image_format}")
        gateway.call("CloneGroupSnapshot", rpc.CloneGroupSnapshotRequest(id=f"new-{image_format}", clones=[spec]))

    def copy() -> None:
        subprocess.run(["cp", "--sparse=always", "--reflink=never", member, directory / ".copy"], check=True)
        subprocess.run(["sync", directory / ".copy"], check=True)

    exact, coarse, instant = timed(lambda: extents(coarse=False)), timed(lambda: extents(coarse=True)), timed(clone)
    # the peers stop at the first difference; what they need for the whole is what they need for two that are the same
    compare = ["cmp"] if image_format == "raw" else ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2"]
    command = [*compare, member, directory / f"c0.{image_format}"]
    peer = timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    print(
        f"{image_format}: what changed {exact:.2f} s ({extents(coarse=False) >> 20} MiB told), coarse {coarse:.2f} s, "
        f"{compare[0]} {peer:.2f} s; clone {instant:.2f} s, cp {timed(copy):.2f} s; "
        f"medians of {ROUNDS}"
    )


def change(path: Path, image_format: str, parts: list[tuple[int, int]], chance: random.Random) -> None:
    """Write new random bytes."""
    if image_format == "raw":
        with path.open("r+b", buffering=0) as file:
            for offset, length in parts:
                os.pwrite(file.fileno(), chance.randbytes(length), offset)
        return
    for begin in range(0, len(parts), 100):
        commands = [written(offset, length, chance) for offset, length in parts[begin : begin + 100]]
        words = [word for command in commands for word in ("-c", command)]
        subprocess.run(["qemu-io", "-f", image_format, *words, path], check=True, stdout=subprocess.DEVNULL)


def written(offset: int, length: int, chance: random.Random) -> str:
    """One of qemu-io's writes."""
    return f"write -P {chance.randrange(1, 256)} {offset} {length}"


def take(gateway: Gateway, group: str, volume: str) -> None:
    """Take a snapshot and wait until it is settled."""
    spec = pb.GroupSnapshotSpec(volumes=[pb.VolumeSpec(ref=ref(volume))])
    gateway.call("CreateGroupSnapshot", rpc.CreateGroupSnapshotRequest(id=group, spec=spec))
    assert list(gateway.watch(group))[-1].state == pb.GROUP_SNAPSHOT_STATE_READY


def ref(volume: str) -> volume_pb2.VolumeRef:
    """Return a volume of the pool."""
    return volume_pb2.VolumeRef(pool="fast", volume=volume)


def timed(work: Callable[[], object]) -> float:
    """Seconds, the median."""
    figures = []
    for _ in range(ROUNDS):
        begin = time.monotonic()
        work()
        figures.append(time.monotonic() - begin)
    return statistics.median(figures)


if __name__ == "__main__":
    sys.exit(main())
