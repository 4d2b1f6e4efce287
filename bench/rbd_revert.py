"""How long does a revert on Ceph take? Ours in place and by swap, and `rbd snap rollback`; 4 GiB, 1 % changed.

One image, full of data, with a snapshot of each kind of the same instant; before every revert the same 1 % is written
again (64 KiB at places drawn once). One node in memory, so that the network and disks cost nothing.
"""

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import rados
import rbd

from providers.base import GroupSpec, VolumeSpec
from providers.ceph.provider import CephProvider
from tests.lab import leftovers, state
from tests.lab.ceph import CephCluster

MIB = 1 << 20
GIB = 1 << 30
SIZE = 4 * GIB
WRITE = 64 * 1024
ROUNDS = 3


def main() -> int:
    """Print one line a way."""
    state.prepare()
    places = random.Random(1).sample(range(SIZE // WRITE), SIZE // 100 // WRITE)
    try:
        with CephCluster("ceph-bench", commit_interval_s=1.0, size=24 * GIB) as cluster:
            cluster.pool("vms")
            cluster.client("frostgate", "vms")
            providers = {
                cut: CephProvider.open_pool(
                    "fast", CephProvider.Options.model_validate({"rbd_pool": "vms", "conf": cluster.conf, "cut": cut})
                )
                for cut in ("group", "parallel")
            }
            fill(cluster)
            for cut, provider in providers.items():
                provider.prepare(GroupSpec(cut, (VolumeSpec("disk"),)))
                provider.cut(cut)
                provider.settle(cut, datetime.now(UTC), b"", lambda _done, _total: None)
            cluster.rbd("snap", "create", "--no-progress", "vms/disk@peer")

            def ours(cut: str, *, instant: bool) -> None:
                providers[cut].prepare_revert(cut, ["disk"], lambda _done, _total: None, instant=instant)
                providers[cut].revert(cut, ["disk"], lambda _done, _total: None)

            rollback = ["rbd", "-c", cluster.conf, "snap", "rollback", "--no-progress", "vms/disk@peer"]
            ways: dict[str, Callable[[], object]] = {
                "rbd snap rollback": lambda: subprocess.run(rollback, check=True, capture_output=True),
                "ours, in place": lambda: ours("group", instant=False),
                "ours, by swap": lambda: ours("parallel", instant=True),
            }
            print(f"revert of a 4 GiB image with 1 % changed, seconds, medians of {ROUNDS} rounds (the swap: one)")
            peer = 0.0
            for name, way in ways.items():
                took = []
                for _ in range(1 if "swap" in name else ROUNDS):
                    damage(cluster, places)
                    began = time.monotonic()
                    way()
                    took.append(time.monotonic() - began)
                figure = statistics.median(took)
                peer = peer or figure
                print(f"{name:>20} {figure:>8.2f}  peer/ours {peer / figure:.1f}", flush=True)
    finally:
        leftovers.remove(state.DEFAULT_STATE_DIR)
    return 0


def fill(cluster: CephCluster) -> None:
    """Make the image, every object of it written."""
    block = random.Random(2).randbytes(4 * MIB)
    with opened(cluster) as context:
        rbd.RBD().create(context, "disk", SIZE)
        with rbd.Image(context, "disk") as image:
            for offset in range(0, SIZE, 4 * MIB):
                image.write(block, offset)


def damage(cluster: CephCluster, places: list[int]) -> None:
    """Write the 1 %."""
    with opened(cluster) as context, rbd.Image(context, "disk") as image:
        for place in places:
            image.write(b"d" * WRITE, place * WRITE)


@contextmanager
def opened(cluster: CephCluster) -> Iterator[Any]:
    """Yield the pool, as the admin."""
    with (
        rados.Rados(conffile=str(cluster.conf), name="client.admin") as connection,
        connection.open_ioctx("vms") as context,
    ):
        yield context


if __name__ == "__main__":
    sys.exit(main())
