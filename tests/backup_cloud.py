"""A running guest on ext4, which cannot clone files: a raw and a qcow2 disk in one pool, another qcow2 in a second.

What the snapshots hold is read past the gateway: by qemu-img on the files themselves.
"""

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from clients.coordinator.taking import Taken, Wish, take
from clients.gateway import Endpoint, Gateway
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from frostgate.v1 import volume_pb2
from tests.gateway_process import GatewayProcess
from tests.guest_cloud import GuestCloud
from tests.lab import state
from tests.lab.disk import create_disk, mounted
from tests.lab.filesystems import mount_filesystem, mount_loop, unmount
from tests.lab.hypervisor import Hypervisor
from tests.lab.machine import Disk, Machine

MIB = 1 << 20
MAX_INCREMENTALS = 2
BALLAST = 40 * MIB
"""Random bytes in the file system of each disk."""

SLOW = "vdd"
"""A large disk without a file system, in snapshots of slowly copied disks only."""

_SLOW_BYTES = 1536 * MIB  # QEMU copies at full speed until it is told otherwise


@dataclass(frozen=True)
class BackupCloud(GuestCloud):
    """`volumes` are (pool, volume) by the disk's target."""

    pools: dict[str, Path]
    volumes: dict[str, tuple[str, str]]

    @property
    def domain(self) -> libvirt.virDomain:
        return self.machine.domain

    def take(self, group: str, *, slow: bool = False, **wish: Any) -> Taken:
        """Cut as `frostgate vm snapshot` does, without waiting for READY; with the slow disk only if asked."""
        with Gateway(Endpoint(self.gateway.address)) as gateway:
            exclude = (*wish.pop("exclude", ()), *(() if slow else (SLOW,)))
            wanted = Wish(group, **{"max_freeze_s": 60.0, "exclude": exclude, **wish})
            return take(gateway, self.hypervisor.uri, self.machine.name, wanted, lambda _text: None)

    def watch(self, group: str) -> Iterator[pb.GroupSnapshot]:
        for response in self.gateway.stub.WatchGroupSnapshot(rpc.WatchGroupSnapshotRequest(id=group), timeout=200):
            yield response.group_snapshot

    def settled(self, group: str) -> pb.GroupSnapshot:
        return list(self.watch(group))[-1]

    def ready(self, group: str, **wish: Any) -> pb.GroupSnapshot:
        """take(), and wait until it is READY."""
        self.take(group, **wish)
        settled = self.settled(group)
        assert settled.state == pb.GROUP_SNAPSHOT_STATE_READY, settled
        return settled

    def delete(self, *groups: str) -> None:
        done = self.vm("delete", *groups, "--yes")
        assert done.returncode == 0, done.stderr

    def spec(self, *targets: str, **attachment: str) -> pb.GroupSnapshotSpec:
        """What the coordinator would ask for, with some of the attachment said otherwise."""
        spec = pb.GroupSnapshotSpec()
        for target in targets:
            pool, volume = self.volumes[target]
            said = {
                "hypervisor": self.hypervisor.connect().getHostname(),
                "domain": self.domain.UUIDString(),
                "disk": target,
            } | attachment
            ref = volume_pb2.VolumeRef(pool=pool, volume=volume)
            spec.volumes.add(ref=ref, attachment=pb.VolumeAttachment(**said))
        return spec

    def image(self, group: str, target: str) -> Path:
        pool, volume = self.volumes[target]
        return self.pools[pool] / ".frostgate" / group / volume

    def below(self, group: str, target: str) -> list[Path]:
        """The files that a member lies on, from the top down, by the manifest."""
        image = self.image(group, target)
        members = json.loads((image.parent / ".manifest.json").read_text())["members"]
        backing = next(member["backing"] for member in members if member["volume"] == image.name)
        return [image.parent / ".backing" / one["kept"] for one in backing]

    def chain(self, group: str, target: str) -> str:
        """A member's image with all below it, as qemu-img takes it for a file name."""
        node: dict[str, Any] | None = None
        for path in reversed([self.image(group, target), *self.below(group, target)]):
            node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": node}
        return "json:" + json.dumps(node)

    def same(self, group: str, target: str) -> bool:
        """Whether the volume is now, byte by byte, what the member is; by qemu-img. The VM must be off."""
        pool, volume = self.volumes[target]
        live = self.pools[pool] / volume
        raw = "raw" if volume.endswith(".raw") else "qcow2"
        node = {"driver": raw, "file": {"driver": "file", "filename": str(live)}}
        command = ["qemu-img", "compare", self.chain(group, target), "json:" + json.dumps(node)]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def file(self, group: str, target: str, path: str) -> bytes:
        """A file in a member, read by the kernel from what qemu-img makes of it."""
        flat = state.prepare() / f"flat-{group}-{target}.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", self.chain(group, target), flat], check=True)
        try:
            with mounted(flat) as root:
                return (root / path).read_bytes()
        finally:
            flat.unlink()

    def counters(self, group: str) -> list[int]:
        """The writer's counter on every disk of a snapshot."""
        return [int(self.file(group, target, "counter")) for target in self.volumes]

    @contextmanager
    def slowly(self) -> Iterator[None]:
        """While this lasts a backup job of the slow disk hardly gets on."""
        over = threading.Event()
        connection = libvirt.open(self.hypervisor.uri)
        domain = connection.lookupByName(self.machine.name)

        def slow() -> None:
            while not over.wait(0.01):
                with suppress(libvirt.libvirtError):  # no job yet
                    domain.blockJobSetSpeed(SLOW, MIB, libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES)

        thread = threading.Thread(target=slow)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with suppress(libvirt.libvirtError):  # it has ended
                domain.blockJobSetSpeed(SLOW, 0, 0)
            connection.close()

    def is_clean(self) -> bool:
        """Nothing of any snapshot, job or checkpoint is left, and the guest lives."""
        return not any(list((root / ".frostgate").glob("[!.]*")) for root in self.pools.values())

    def has_job(self) -> bool:
        return bool(self.domain.jobStats()["type"])


@contextmanager
def backup_cloud(directory: Path) -> Iterator[BackupCloud]:
    """Start one, with a running guest that writes all the time; stopped and removed afterwards."""
    lab = state.prepare()
    with mount_filesystem("ext4", lab / "backup", 6144 * MIB) as filesystem, Hypervisor(name="backup") as hypervisor:
        pools = {"main": filesystem.directory / "main", "other": filesystem.directory / "other"}
        for root in pools.values():
            root.mkdir()
        allowed = {hypervisor.connect().getHostname(): hypervisor.uri}
        options = {"kind": "nfs", "hypervisors": allowed, "max_incrementals": MAX_INCREMENTALS}
        tables = {name: {**options, "root": str(root)} for name, root in pools.items()}
        volumes = {"vda": ("main", "a.raw"), "vdb": ("main", "b.qcow2"), "vdc": ("other", "c.qcow2")}
        disks = [_disk(pools[pool] / volume) for pool, volume in volumes.values()]
        slow = pools["main"] / "slow.raw"
        subprocess.run(["dd", "if=/dev/zero", f"of={slow}", "bs=1M", f"count={_SLOW_BYTES // MIB}"], check=True)
        disks.append(Disk(slow))
        with (
            GatewayProcess(directory, tables) as gateway,
            Machine(hypervisor, "backed", disks, hook=True).running() as machine,
        ):
            yield BackupCloud(gateway, hypervisor, machine, pools, volumes)
    state.release()


def _disk(path: Path) -> Disk:
    """A disk with ballast in its file system, and half of that free."""
    raw = create_disk(path.with_name(f"{path.name}.new"), 96 * MIB, "ext4")
    point = path.with_name(f"{path.name}.mnt")
    point.mkdir()
    mount_loop(raw, point)
    subprocess.run(
        ["dd", "if=/dev/urandom", f"of={point}/ballast", "bs=1M", f"count={BALLAST // MIB}", "status=none"], check=True
    )
    unmount(point)
    point.rmdir()
    if path.suffix == ".raw":
        raw.rename(path)
        return Disk(path)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    raw.unlink()
    return Disk(path, "qcow2")
