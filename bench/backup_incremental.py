"""What does the second snapshot cost on a file system that cannot clone? Ours beside a full backup job.

ext4, a qcow2 disk with 4 GiB of data of which the guest overwrites 1 % between the snapshots. The peer is what
`virsh backup-begin` without a checkpoint copies: everything.
"""

import subprocess
import sys
import time
from pathlib import Path

from clients.coordinator.taking import Wish, take
from clients.gateway import Endpoint, Gateway
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.gateway_process import GatewayProcess
from tests.lab import leftovers, state
from tests.lab.disk import create_disk
from tests.lab.filesystems import mount_filesystem
from tests.lab.hypervisor import Hypervisor
from tests.lab.machine import Disk, Machine

MIB, GIB = 1 << 20, 1 << 30
DATA = 4 * GIB
CHANGED = DATA // 100


def main() -> int:
    """Print bytes and seconds of both, and the ratios."""
    lab = state.prepare()
    try:
        with (
            mount_filesystem("ext4", lab / "bench-backup", 20 * GIB) as pool,
            Hypervisor(name="bench-incremental") as hypervisor,
        ):
            allowed = {hypervisor.connect().getHostname(): hypervisor.uri}
            table = {"kind": "nfs", "root": str(pool.directory), "hypervisors": allowed}
            with GatewayProcess(lab / "bench-gateway", {"pool": table}) as process:
                measure(process, hypervisor, pool.directory)
    finally:
        leftovers.remove(state.DEFAULT_STATE_DIR)
    return 0


def measure(process: GatewayProcess, hypervisor: Hypervisor, pool: Path) -> None:
    """Boot the guest, take two snapshots and the peer's full copy, print the lines."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", pool / "data.qcow2", str(DATA)], check=True)
    _fill(pool / "data.qcow2")
    disks = [Disk(create_disk(pool / "root.raw", 256 * MIB, "ext4")), Disk(pool / "data.qcow2", "qcow2")]
    machine = Machine(hypervisor, "bench", disks, writer=True)
    with machine.running():
        ready(process, hypervisor, "first")
        write = f"dd if=/dev/urandom of=/dev/vdb bs=64k seek=1000 count={CHANGED // 65536} conv=notrunc && sync"
        code, said = machine.exec(["/bin/sh", "-c", write], timeout_s=300)
        if code:
            raise RuntimeError(said)
        ours_s = ready(process, hypervisor, "second")
        ours = (pool / ".frostgate" / "second" / "data.qcow2").stat().st_blocks * 512
        theirs_s = full_copy(machine, pool / "full.qcow2")
        theirs = (pool / "full.qcow2").stat().st_blocks * 512
    print(f"second snapshot after 1 % of {DATA // GIB} GiB changed, ext4, guest under TCG")
    print(f"{'':>6} {'MiB written':>11} {'seconds':>8}")
    print(f"{'ours':>6} {ours / MIB:>11.0f} {ours_s:>8.1f}")
    print(f"{'full':>6} {theirs / MIB:>11.0f} {theirs_s:>8.1f}")
    print(f"full / ours: {theirs / ours:.0f} times the bytes, {theirs_s / ours_s:.1f} times the time")


def _fill(image: Path) -> None:
    """Give an image data in every cluster."""
    words = [word for offset in range(0, DATA, GIB) for word in ("-c", f"write -P 0x5a {offset} {GIB}")]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, image], check=True, stdout=subprocess.DEVNULL)


def ready(process: GatewayProcess, hypervisor: Hypervisor, group: str) -> float:
    """Take a snapshot of the large disk; seconds until it is READY."""
    began = time.monotonic()
    with Gateway(Endpoint(process.address)) as gateway:
        take(gateway, hypervisor.uri, "bench", Wish(group, max_freeze_s=60, exclude=("vda",)), lambda _text: None)
    request = rpc.WatchGroupSnapshotRequest(id=group)
    last = [answer.group_snapshot for answer in process.stub.WatchGroupSnapshot(request)][-1]
    if last.state != pb.GROUP_SNAPSHOT_STATE_READY:
        raise RuntimeError(str(last.failure))
    return time.monotonic() - began


def full_copy(machine: Machine, target: Path) -> float:
    """Seconds of a backup job that copies the large disk whole."""
    disk = f"<disk name='vdb' type='file'><driver type='qcow2'/><target file='{target}'/></disk>"
    began = time.monotonic()
    machine.domain.backupBegin(f"<domainbackup><disks>{disk}</disks></domainbackup>", None, 0)
    while machine.domain.jobStats()["type"]:
        time.sleep(0.05)
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
