"""A gateway, a simulated StorPool cluster, a libvirtd and a running guest whose disks are the cluster's volumes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.gateway_process import GatewayProcess
from tests.guest_cloud import GuestCloud
from tests.lab import state
from tests.lab.disk import create_disk
from tests.lab.hypervisor import Hypervisor
from tests.lab.machine import Disk, Machine
from tests.lab.storpool import CLIENT, StorpoolSim

MIB = 1 << 20
VOLUMES = ("web1-root", "web1-data", "web1-logs")


@dataclass(frozen=True)
class StorpoolCloud(GuestCloud):
    """web1 has vda, vdb and vdc in the pool "sp", attached to this host, where it may detach them."""

    cluster: StorpoolSim

    def attached(self) -> list[tuple[str, int, str]]:
        """All attachments: name, client, rights."""
        return sorted((one.volume, one.client, one.rights) for one in self.cluster.api().attachmentsList())

    def is_clean(self) -> bool:
        """Whether the cluster has the guest's volumes and nothing else, attached as they were."""
        api = self.cluster.api()
        return (
            sorted(one.name for one in api.volumesList()) == sorted(VOLUMES)
            and not any("frostgate" in (one.tags or {}) for one in api.snapshotsList() if not one.deleted)
            and self.attached() == sorted((name, CLIENT, "rw") for name in VOLUMES)
        )


@contextmanager
def storpool_cloud(directory: Path) -> Iterator[StorpoolCloud]:
    """Start all of it."""
    state.prepare()
    image = create_disk(directory / "disk.raw", 128 * MIB, "ext4")
    with StorpoolSim("storpool-cloud") as cluster:
        disks = []
        for name in VOLUMES:
            device = cluster.create(name, 128 * MIB)
            with image.open("rb") as source, device.open("r+b") as target:
                shutil.copyfileobj(source, target, MIB)
            disks.append(Disk(device))
        with (
            GatewayProcess(directory / "gateway", {"sp": cluster.pool(force_detach=True)}) as gateway,
            Hypervisor(name="storpool") as hypervisor,
            Machine(hypervisor, "web1", disks, hook=True).running() as machine,
        ):
            yield StorpoolCloud(gateway, hypervisor, machine, cluster)
    state.release()
