"""One hypervisor, one XFS pool and one running guest with two disks, for each module that asks; pytest's workers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gateway_process import GatewayProcess
from tests.guest_cloud import GuestCloud
from tests.lab import state
from tests.lab.disk import create_disk
from tests.lab.filesystems import mount_filesystem
from tests.lab.hypervisor import Hypervisor
from tests.lab.machine import Disk, Machine
from tests.rbd_cloud import RbdCloud, rbd_cloud
from tests.workers import ByRealParts

MIB = 1 << 20


def pytest_xdist_make_scheduler(config: pytest.Config, log):  # type: ignore[no-untyped-def]
    """How `--numprocesses` shares out the tests."""
    from tests.conformance.conftest import STORAGES

    return ByRealParts(config, log, STORAGES)


@dataclass(frozen=True)
class Cloud(GuestCloud):
    """web1 has vda and vdb in the pool "fast", a directory on XFS."""

    pool: Path


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    lab = state.prepare()
    with (
        mount_filesystem("xfs", lab / "e2e-pool", 2048 * MIB) as filesystem,
        GatewayProcess(
            tmp_path_factory.mktemp("gateway"), {"fast": {"kind": "nfs", "root": str(filesystem.directory)}}
        ) as gateway,
        Hypervisor(name="e2e") as hypervisor,
    ):
        disks = [Disk(create_disk(filesystem.directory / f"{letter}.raw", 256 * MIB, "ext4")) for letter in "ab"]
        with Machine(hypervisor, "web1", disks, hook=True).running() as machine:
            yield Cloud(gateway, hypervisor, machine, filesystem.directory)
    state.release()


@pytest.fixture(scope="module")
def rbd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RbdCloud]:
    with rbd_cloud(tmp_path_factory.mktemp("rbd")) as made:
        yield made
