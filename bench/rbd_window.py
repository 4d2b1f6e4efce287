"""How long is the guest frozen on Ceph? Ours, a loop of snapshots under the freeze, and parallel snapshots.

The same running guest and cluster (one node in memory, Ceph's own paxos_propose_interval of 1 s), the three in turn in
every round; medians. The loop is what CloudStack's StorageVMSnapshotStrategy does, one librbd snapshot a disk; both
peers hold their images open before the freeze. "idle" is a monitor that commits nothing of its own; the last column is
ours beside a manager, whose reports to the monitor keep it committing.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import libvirt
import rados
import rbd

from clients.coordinator.taking import Wish, take
from clients.gateway import Endpoint, Gateway
from tests.gateway_process import GatewayProcess
from tests.lab import leftovers, state
from tests.lab.ceph import CephCluster
from tests.lab.disk import create_disk
from tests.lab.hypervisor import Hypervisor
from tests.lab.machine import Machine, RbdDisk

MIB = 1 << 20
ROUNDS = 3
QUIET_S = 2.5


def main() -> int:
    """Print one line a number of disks."""
    lab = state.prepare()
    print("freeze window in ms, medians of", ROUNDS, "rounds; RBD images, guest under TCG, monitor idle")
    print(
        f"{'disks':>5} {'ours':>7} {'of it cut':>9} {'loop':>7} {'parallel':>8} {'loop/ours':>9} "
        f"{'parallel/ours':>13} {'ours beside a manager':>21}"
    )
    try:
        with (
            CephCluster("ceph-bench", commit_interval_s=1.0, stats_period_s=5) as cluster,
            Hypervisor(name="bench-rbd") as hypervisor,
        ):
            cluster.pool("vms")
            cluster.client("frostgate", "vms")
            pools = {"fast": {"kind": "ceph", "conf": str(cluster.conf), "rbd_pool": "vms"}}
            template = create_disk(lab / "template.raw", 64 * MIB, "ext4")
            with GatewayProcess(lab / "bench", pools) as process, Gateway(Endpoint(process.address)) as gateway:
                for count in (1, 2, 4, 8, 16):
                    names = [f"d{count}-{number}" for number in range(count)]
                    for name in names:
                        cluster.rbd("import", "--no-progress", template, f"vms/{name}")
                    measure(gateway, hypervisor, cluster, names)
            template.unlink()
    finally:
        leftovers.remove(state.DEFAULT_STATE_DIR)
    return 0


def measure(gateway: Gateway, hypervisor: Hypervisor, cluster: CephCluster, names: list[str]) -> None:
    """Boot a guest with so many disks and measure."""
    disks = [RbdDisk("vms", name, cluster.monitors, cluster.conf) for name in names]
    machine = Machine(hypervisor, f"rbd{len(names)}", disks, writer=True, hook=True)
    ours, cuts, loop, parallel, managed = [], [], [], [], []
    with machine.running(), images(cluster, names) as opened:
        for number in range(ROUNDS):
            cluster.start_daemon("mgr")
            time.sleep(QUIET_S)
            managed.append(snapshot(gateway, hypervisor, machine)[0])
            cluster.kill_daemon("mgr")
            time.sleep(QUIET_S)
            window, cut = snapshot(gateway, hypervisor, machine)
            ours.append(window)
            cuts.append(cut)
            time.sleep(QUIET_S)
            loop.append(frozen(machine.domain, lambda n=number: [image.create_snap(f"l{n}") for image in opened]))
            time.sleep(QUIET_S)
            with ThreadPoolExecutor(len(opened)) as threads:
                parallel.append(
                    frozen(
                        machine.domain,
                        lambda n=number, t=threads: list(t.map(lambda image: image.create_snap(f"p{n}"), opened)),
                    )
                )
            time.sleep(QUIET_S)
    mine, one_by_one, at_once = (statistics.median(figures) for figures in (ours, loop, parallel))
    print(
        f"{len(names):>5} {mine:>7.0f} {statistics.median(cuts):>9.0f} {one_by_one:>7.0f} {at_once:>8.0f} "
        f"{one_by_one / mine:>9.1f} {at_once / mine:>13.2f} {statistics.median(managed):>21.0f}",
        flush=True,
    )


def snapshot(gateway: Gateway, hypervisor: Hypervisor, machine: Machine) -> tuple[float, float]:
    """Milliseconds of our window, and of the cut in it."""
    taken = take(gateway, hypervisor.uri, machine.name, Wish(max_freeze_s=10), lambda _text: None)
    for _ in gateway.watch(taken.snapshot.id):
        pass
    return taken.window.window_s * 1000, taken.snapshot.cut_duration.ToNanoseconds() / 1e6


def frozen(domain: libvirt.virDomain, work: Callable[[], object]) -> float:
    """Milliseconds of a freeze, some work and the thaw."""
    began = time.monotonic()
    domain.fsFreeze()
    try:
        work()
    finally:
        domain.fsThaw()
    return (time.monotonic() - began) * 1000


@contextmanager
def images(cluster: CephCluster, names: list[str]) -> Iterator[list[Any]]:
    """Yield the peers' images, open."""
    with rados.Rados(conffile=str(cluster.conf), name="client.admin") as connection:
        context = connection.open_ioctx("vms")
        opened = [rbd.Image(context, name) for name in names]
        try:
            yield opened
        finally:
            for image in opened:
                image.close()
            context.close()


if __name__ == "__main__":
    sys.exit(main())
