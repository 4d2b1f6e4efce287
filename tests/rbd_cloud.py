"""A gateway, a one-node Ceph, a libvirtd and a running guest whose disks are RBD images and a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gateway_process import GatewayProcess
from tests.guest_cloud import GuestCloud
from tests.lab import state
from tests.lab.ceph import CephCluster
from tests.lab.disk import create_disk
from tests.lab.filesystems import mount_filesystem
from tests.lab.hypervisor import Hypervisor
from tests.lab.machine import Disk, Machine, RbdDisk

MIB = 1 << 20
IMAGES = ("vms/web1-root", "vms/web1-data", "more/web1-logs")


@dataclass(frozen=True)
class RbdCloud(GuestCloud):
    """web1 has vda and vdb in the pool "fast", vdc in "more" (another rbd pool), vdd in "files" (a directory)."""

    cluster: CephCluster

    def snapshots(self, image: str) -> list[dict[str, Any]]:
        """All snapshots of an image, those of groups too."""
        found: list[dict[str, Any]] = self.cluster.rbd_json("snap", "ls", "--all", image)
        return found

    def groups(self, pool: str = "vms") -> list[str]:
        """The RBD groups in a pool."""
        found: list[str] = self.cluster.rbd_json("group", "ls", pool)
        return found

    def is_clean(self) -> bool:
        """Whether the cluster has nothing of any group snapshot."""
        objects = self.cluster.rados("vms", "ls").split() + self.cluster.rados("more", "ls").split()
        return (
            not any(self.snapshots(image) for image in IMAGES)
            and not self.groups("vms")
            and not self.groups("more")
            and not any(name.startswith("frostgate.group.") for name in objects)
        )


@contextmanager
def rbd_cloud(directory: Path) -> Iterator[RbdCloud]:
    """Start all of it."""
    lab = state.prepare()
    with (
        CephCluster("ceph-cloud") as cluster,
        mount_filesystem("xfs", lab / "files-pool", 1024 * MIB) as filesystem,
    ):
        for pool in ("vms", "more"):
            cluster.pool(pool)
        cluster.client("frostgate", "vms", "more")
        common = {"kind": "ceph", "conf": str(cluster.conf), "commit_interval_s": 0.05, "timeout_s": 6}
        pools: dict[str, dict[str, Any]] = {
            "fast": {**common, "rbd_pool": "vms"},
            "more": {**common, "rbd_pool": "more"},
            "files": {"kind": "nfs", "root": str(filesystem.directory)},
        }
        image = create_disk(directory / "disk.raw", 128 * MIB, "ext4")
        for name in IMAGES:
            cluster.rbd("import", "--no-progress", image, name)
        files = create_disk(filesystem.directory / "web1-files.raw", 128 * MIB, "ext4")
        disks = [RbdDisk(*name.split("/"), monitors=cluster.monitors, config_file=cluster.conf) for name in IMAGES]
        with (
            GatewayProcess(directory / "gateway", pools) as gateway,
            Hypervisor(name="rbd") as hypervisor,
            Machine(hypervisor, "web1", [*disks, Disk(files)], hook=True).running() as machine,
        ):
            yield RbdCloud(gateway, hypervisor, machine, cluster)
    state.release()
