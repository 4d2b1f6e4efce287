"""How long is the guest frozen on StorPool? Ours beside one snapshot call a volume in a loop, under the same freeze.

A running guest on a simulated cluster that waits 20 ms before every answer; the two in turn in every round, medians.
The loop is what StorPool's API is used for where the group call is not: VolumeSnapshot once a volume, by StorPool's own
bindings. The cut is the part that is the storage's; the rest of the window is the guest's freezing and thawing.
"""

import shutil
import statistics
import sys
import time

from clients.coordinator.taking import Wish, take
from clients.gateway import Endpoint, Gateway
from tests.gateway_process import GatewayProcess
from tests.lab import leftovers, state
from tests.lab.disk import create_disk
from tests.lab.hypervisor import Hypervisor
from tests.lab.machine import Disk, Machine
from tests.lab.storpool import StorpoolSim

MIB = 1 << 20
LATENCY_MS = 20
ROUNDS = 5


def main() -> int:
    """Print one line a number of volumes."""
    lab = state.prepare()
    print(
        f"freeze window in ms, medians of {ROUNDS} rounds; simulated StorPool, {LATENCY_MS} ms a call, guest under TCG"
    )
    print(f"{'volumes':>7} {'ours':>6} {'of it cut':>9} {'loop':>6} {'of it snapshots':>15} {'loop/ours':>9}")
    try:
        image = create_disk(lab / "template.raw", 64 * MIB, "ext4")
        with (
            StorpoolSim("storpool-bench", latency_ms=LATENCY_MS) as cluster,
            GatewayProcess(lab / "bench", {"sp": cluster.pool()}) as process,
            Gateway(Endpoint(process.address)) as gateway,
            Hypervisor(name="bench-sp") as hypervisor,
        ):
            for count in (1, 2, 4, 8):
                names = [f"d{count}-{number}" for number in range(count)]
                disks = []
                for name in names:
                    device = cluster.create(name, 64 * MIB)
                    with image.open("rb") as source, device.open("r+b") as target:
                        shutil.copyfileobj(source, target, MIB)
                    disks.append(Disk(device))
                measure(gateway, hypervisor, cluster, names, disks)
    finally:
        leftovers.remove(state.DEFAULT_STATE_DIR)
    return 0


def measure(
    gateway: Gateway, hypervisor: Hypervisor, cluster: StorpoolSim, names: list[str], disks: list[Disk]
) -> None:
    """Boot a guest with these disks and measure."""
    machine = Machine(hypervisor, f"sp{len(names)}", disks, writer=True, hook=True)
    ours, cuts, loop, calls = [], [], [], []
    with machine.running():
        for _ in range(ROUNDS):
            taken = take(gateway, hypervisor.uri, machine.name, Wish(max_freeze_s=10), lambda _text: None)
            for _ in gateway.watch(taken.snapshot.id):
                pass
            ours.append(taken.window.window_s * 1000)
            cuts.append(taken.snapshot.cut_duration.ToNanoseconds() / 1e6)
            whole, part = one_by_one(machine, cluster, names)
            loop.append(whole)
            calls.append(part)
    mine, cut, peer, part = (statistics.median(figures) for figures in (ours, cuts, loop, calls))
    print(f"{len(names):>7} {mine:>6.0f} {cut:>9.0f} {peer:>6.0f} {part:>15.0f} {peer / mine:>9.1f}", flush=True)


def one_by_one(machine: Machine, cluster: StorpoolSim, names: list[str]) -> tuple[float, float]:
    """Milliseconds of a freeze, a snapshot of every volume in turn and the thaw; and of the snapshots in it."""
    api = cluster.api()
    began = time.monotonic()
    machine.domain.fsFreeze()
    try:
        frozen = time.monotonic()
        for name in names:
            api.snapshotCreate(name, {})
        part = time.monotonic() - frozen
    finally:
        machine.domain.fsThaw()
    return (time.monotonic() - began) * 1000, part * 1000


if __name__ == "__main__":
    sys.exit(main())
