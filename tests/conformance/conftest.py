"""One gateway a storage for the whole session; every test has volumes and ids of its own and leaves nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance.bench import Bench, refused, watched
from tests.conformance.ceph import Ceph
from tests.conformance.storages import Directory, Storage
from tests.conformance.storpool import Storpool
from tests.gateway_process import GatewayProcess
from tests.lab import state

__all__ = ["Bench", "refused"]  # for the tests

STORAGES: dict[str, Callable[[], Storage]] = {
    "ceph-group": lambda: Ceph("group"),
    "ceph-parallel": lambda: Ceph("parallel"),
    "nfs-ext4": lambda: Directory("ext4"),
    "nfs-xfs": lambda: Directory("xfs"),
    "storpool": Storpool,
}
CLONING = pytest.mark.parametrize("storage", sorted(STORAGES), indirect=True)
"""For storages that clone volumes; the others refuse (test_cloning.py)."""

COMPARING = CLONING
"""For storages that compare snapshots; the others refuse (test_changes.py)."""

FILES = pytest.mark.parametrize("storage", ["nfs-ext4", "nfs-xfs"], indirect=True)
"""For tests of what only files can be or do."""

EXT4 = pytest.mark.parametrize("storage", ["nfs-ext4"], indirect=True)
"""For those where files are copied."""

XFS = pytest.mark.parametrize("storage", ["nfs-xfs"], indirect=True)
"""For those where they are cloned, and where it makes no difference."""


@pytest.fixture(scope="session", params=sorted(STORAGES))
def storage(request: pytest.FixtureRequest) -> Iterator[Storage]:
    made: Storage = STORAGES[request.param]()
    made.start(state.prepare() / f"conformance-{request.param}")
    try:
        yield made
    finally:
        made.stop()
        (state.DEFAULT_STATE_DIR / f"conformance-{request.param}").rmdir()
        state.release()


@pytest.fixture(scope="session")
def gateway(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(tmp_path_factory.mktemp("gateway"), storage.pools()) as running:
        yield running


@pytest.fixture
def bench(storage: Storage, gateway: GatewayProcess, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """What most tests use. The gateway must log nothing unexpected meanwhile."""
    with watched(Bench(storage, gateway), request) as made:
        yield made


@pytest.fixture
def own(storage: Storage, tmp_path: Path) -> Iterator[Bench]:
    """A gateway of the test's own, to be killed."""
    with GatewayProcess(tmp_path / "own", storage.pools(), drain_s=5) as running:
        made = Bench(storage, running)
        yield made
        made.clean()
