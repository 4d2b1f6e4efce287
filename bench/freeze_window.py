"""How long is the guest frozen? Ours, freeze and thaw alone (the floor), and virsh's quiesced disk-only snapshot.

The same running guest, disks of 1 GiB on XFS, the three in turn in every round; medians. The peer is
`virsh snapshot-create-as --disk-only --quiesce`'s own call (virDomainSnapshotCreateXML), merged back after each.
"""

import statistics
import sys
import time
from pathlib import Path

import libvirt
from lxml import etree

from clients.coordinator.taking import Wish, take
from clients.gateway import Endpoint, Gateway
from tests.gateway_process import GatewayProcess
from tests.lab import leftovers, state
from tests.lab.disk import create_disk
from tests.lab.filesystems import mount_filesystem
from tests.lab.hypervisor import Hypervisor
from tests.lab.machine import Disk, Machine

GIB = 1 << 30
ROUNDS = 7


def main() -> int:
    """Print one line a number of disks."""
    lab = state.prepare()
    print("freeze window in ms, medians of", ROUNDS, "rounds; disks of 1 GiB on XFS, guest under TCG")
    print(f"{'disks':>5} {'ours':>8} {'of it cut':>9} {'floor':>8} {'peer':>8} {'ours-floor':>10} {'ours/peer':>9}")
    try:
        with (
            mount_filesystem("xfs", lab / "bench-pool", 24 * GIB) as pool,
            GatewayProcess(lab / "bench", {"fast": {"kind": "nfs", "root": str(pool.directory)}}) as process,
            Hypervisor(name="bench-hypervisor") as hypervisor,
            Gateway(Endpoint(process.address)) as gateway,
        ):
            for count in (1, 2, 4, 8):
                measure(gateway, hypervisor, pool.directory, count)
    finally:
        leftovers.remove(state.DEFAULT_STATE_DIR)
    return 0


def measure(gateway: Gateway, hypervisor: Hypervisor, pool: Path, count: int) -> None:
    """Boot a guest with so many disks and measure the three in turn."""
    disks = [Disk(create_disk(pool / f"d{count}-{number}.raw", GIB, "ext4")) for number in range(count)]
    machine = Machine(hypervisor, f"bench{count}", disks, writer=True)
    ours, cuts, floor, peer = [], [], [], []
    with machine.running():
        for _ in range(ROUNDS):
            taken = take(gateway, hypervisor.uri, machine.name, Wish(), lambda _text: None)
            ours.append(taken.window.window_s * 1000)
            cuts.append(taken.snapshot.cut_duration.ToNanoseconds() / 1e6)
            gateway.delete(taken.snapshot.id)
            floor.append(freeze_and_thaw(machine.domain))
            peer.append(external_snapshot(machine.domain, pool))
    for disk in disks:
        disk.path.unlink()
    mine, least, theirs = (statistics.median(figures) for figures in (ours, floor, peer))
    print(
        f"{count:>5} {mine:>8.0f} {statistics.median(cuts):>9.1f} {least:>8.0f} {theirs:>8.0f} "
        f"{mine - least:>10.0f} {mine / theirs:>9.2f}",
        flush=True,
    )


def freeze_and_thaw(domain: libvirt.virDomain) -> float:
    """Milliseconds of freeze and thaw with nothing between."""
    began = time.monotonic()
    domain.fsFreeze()
    domain.fsThaw()
    return (time.monotonic() - began) * 1000


def external_snapshot(domain: libvirt.virDomain, pool: Path) -> float:
    """Milliseconds of the peer's quiesced snapshot; its overlays are merged back and removed."""
    root = etree.Element("domainsnapshot")
    listed = etree.SubElement(root, "disks")
    targets = [element.get("dev") for element in etree.fromstring(domain.XMLDesc(0)).iterfind(".//disk/target")]
    for target in targets:
        disk = etree.SubElement(listed, "disk", name=target, snapshot="external")
        etree.SubElement(disk, "source", file=str(pool / f"overlay-{target}"))
    flags = (
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    )
    began = time.monotonic()
    domain.snapshotCreateXML(etree.tostring(root, encoding="unicode"), flags)
    took = (time.monotonic() - began) * 1000
    for target in targets:
        domain.blockCommit(target, None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        while True:
            job = domain.blockJobInfo(target, 0)
            if job and job["cur"] == job["end"] and job["end"]:
                try:
                    domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
                    break
                except libvirt.libvirtError:
                    pass  # not ready yet
            time.sleep(0.02)
        (pool / f"overlay-{target}").unlink()
    return took


if __name__ == "__main__":
    sys.exit(main())
