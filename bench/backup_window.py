"""How long is a guest frozen on a file system that cannot clone? Ours beside a copy under freeze and virsh by hand.

ext4, a disk with the guest's file system and a raw one with 1 or 16 GiB of data. The naive peer freezes, copies with
`cp --sparse=auto`, thaws; the other is `virsh domfsfreeze`, `backup-begin`, `domfsthaw`. Ours has to be the same for
both sizes.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from clients.coordinator.taking import Wish, take
from clients.gateway import Endpoint, Gateway
from tests.gateway_process import GatewayProcess
from tests.lab import leftovers, state
from tests.lab.disk import create_disk
from tests.lab.filesystems import mount_filesystem
from tests.lab.hypervisor import Hypervisor
from tests.lab.machine import Disk, Machine

MIB, GIB = 1 << 20, 1 << 30
SIZES = (1, 16)
ROUNDS = 5


def main() -> int:
    """Print one line a size, and how they compare."""
    lab = state.prepare()
    print("freeze window in ms on ext4, medians of", ROUNDS, "rounds (cp: one); guest under TCG")
    print(f"{'data':>7} {'ours':>8} {'of it cut':>9} {'virsh':>8} {'cp':>8} {'virsh/ours':>10} {'cp/ours':>8}")
    ours = []
    try:
        for size in SIZES:
            with mount_filesystem("ext4", lab / "bench-backup", (5 * size // 2 + 3) * GIB) as pool:
                ours.append(measure(pool.directory, lab, size))
    finally:
        leftovers.remove(state.DEFAULT_STATE_DIR)
    print(f"{SIZES[1]} GiB / {SIZES[0]} GiB: {ours[1] / ours[0]:.2f}")
    return 0


def measure(pool: Path, lab: Path, size_gib: int) -> float:
    """Boot a guest with that much data, measure the three, print a line and return ours."""
    disks = [Disk(create_disk(pool / "root.raw", 256 * MIB, "ext4")), Disk(data(pool / "data.raw", size_gib * GIB))]
    name = f"bench{size_gib}"
    windows, cuts, virsh = [], [], []
    with Hypervisor(name=name) as hypervisor:
        allowed = {hypervisor.connect().getHostname(): hypervisor.uri}
        table = {"kind": "nfs", "root": str(pool), "hypervisors": allowed}
        machine = Machine(hypervisor, name, disks, writer=True)
        with (
            GatewayProcess(lab / f"gateway-{name}", {"pool": table}) as process,
            Gateway(Endpoint(process.address)) as gateway,
            machine.running(),
        ):
            for _ in range(ROUNDS):
                taken = take(gateway, hypervisor.uri, name, Wish(max_freeze_s=60), lambda _text: None)
                windows.append(taken.window.window_s * 1000)
                cuts.append(taken.snapshot.cut_duration.ToNanoseconds() / 1e6)
                gateway.delete(taken.snapshot.id)
                wait_removed(pool / ".frostgate" / taken.snapshot.id)
                virsh.append(by_hand(hypervisor, machine, pool))
            naive = copied_under_freeze(machine, pool)
    for disk in disks:
        disk.path.unlink()
    mine, theirs = statistics.median(windows), statistics.median(virsh)
    print(
        f"{size_gib:>3} GiB {mine:>8.0f} {statistics.median(cuts):>9.0f} {theirs:>8.0f} {naive:>8.0f} "
        f"{theirs / mine:>10.2f} {naive / mine:>8.1f}",
        flush=True,
    )
    return mine


def data(path: Path, size_bytes: int) -> Path:
    """Write a file without holes."""
    part = os.urandom(16 * MIB)
    with path.open("wb") as file:
        for _ in range(size_bytes // len(part)):
            file.write(part)
    return path


def by_hand(hypervisor: Hypervisor, machine: Machine, pool: Path) -> float:
    """Milliseconds from domfsfreeze to domfsthaw with backup-begin between; the job is aborted."""
    description = pool / "backup.xml"
    listed = "".join(
        f"<disk name='{target}' type='file'><target file='{pool}/theirs-{target}'/><driver type='qcow2'/></disk>"
        for target in ("vda", "vdb")
    )
    description.write_text(f"<domainbackup><disks>{listed}</disks></domainbackup>")
    began = time.monotonic()
    for words in (("domfsfreeze",), ("backup-begin", description), ("domfsthaw",)):
        verb, *rest = words
        command = ["virsh", "-c", hypervisor.uri, verb, machine.name, *rest]
        subprocess.run(command, check=True, capture_output=True)
    took = (time.monotonic() - began) * 1000
    machine.domain.abortJob()
    while machine.domain.jobStats()["type"]:
        time.sleep(0.05)
    for target in ("vda", "vdb"):
        (pool / f"theirs-{target}").unlink(missing_ok=True)
    return took


def copied_under_freeze(machine: Machine, pool: Path) -> float:
    """Milliseconds of a freeze that lasts until both disks are copied."""
    copies = [pool / f"copy-{disk.path.name}" for disk in machine.disks if isinstance(disk, Disk)]
    began = time.monotonic()
    machine.domain.fsFreeze()
    for disk, copy in zip(machine.disks, copies, strict=True):
        subprocess.run(["cp", "--sparse=auto", disk.path, copy], check=True)  # type: ignore[union-attr]
    machine.domain.fsThaw()
    took = (time.monotonic() - began) * 1000
    for copy in copies:
        copy.unlink()
    return took


def wait_removed(path: Path) -> None:
    """Wait until a deletion is done."""
    while path.exists():
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
