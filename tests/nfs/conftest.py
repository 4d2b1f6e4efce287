"""On the host: hand the tests to a guest (relay.py). In the guest: one server, its exports as pools, two gateways."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import waiting
from tests.conformance.bench import Bench, watched
from tests.conformance.storages import Directory
from tests.gateway_process import GatewayProcess
from tests.nfs import relay
from tests.nfs.server import Export, Server

NOBODY = 65534
EXPORTS = (
    Export("main", "xfs"),
    Export("copy", "ext4"),
    Export("squashed", "xfs", "rw,root_squash", owner=NOBODY),
    Export("roots", "xfs", "rw,root_squash"),
    Export("readonly", "xfs", "ro,no_root_squash"),
    Export("replaced", "xfs"),
)
HASTY_CUT_S = 5
_START_TIMEOUT_S = 400


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """See relay.py."""
    if relay.IN_GUEST in os.environ or session.config.option.collectonly:
        return None
    if session.testsfailed:
        raise session.Interrupted(f"{session.testsfailed} errors during collection")
    if strangers := [item.nodeid for item in session.items if "/nfs/" not in item.nodeid]:
        raise pytest.UsageError(f"tests/nfs runs alone (make test-nfs), not with {strangers[0]}")
    relay.run_in_guest(session)
    return True


wait = partial(waiting.wait, timeout_s=300, every_s=0.001)
"""For as long as a guest on a busy machine may need."""


class OverNfs(Directory):
    """The pools are NFS mounts; the suite itself writes and looks on the server, as another host."""

    def __init__(self, server: Server) -> None:
        super().__init__("xfs")
        self.server = server
        self._exports = {export.name: export for export in server.exports}

    def start(self, directory: Path) -> None:
        self._directory = directory

    def stop(self) -> None:
        pass

    @property
    def socket(self) -> Path:
        """Where a daemon of the test's own can listen."""
        return self._directory / "own.sock"

    def root(self, pool: str) -> Path:
        return self._exports[pool].served

    def mounted(self, pool: str = "main") -> Path:
        """Where the gateway sees a pool."""
        return self._exports[pool].mounted

    def pools(self) -> dict[str, dict[str, Any]]:
        return {name: {"kind": "nfs", "root": str(export.mounted)} for name, export in self._exports.items()}

    def leftovers(self, pool: str = "main") -> list[str]:
        """What the gateway has left on the server besides volumes and its lock file."""
        root = self.root(pool)
        hidden = [path.name for path in root.glob(".*") if path.name != ".frostgate"]
        return hidden + [path.name for path in root.glob(".frostgate/*") if path.name != ".lock"]


class SlowBench(Bench):
    """For a guest on a busy machine."""

    timeout_s = 300.0


@pytest.fixture(scope="session")
def server() -> Server:
    made = Server(EXPORTS, {"xfs": Path("/dev/vda"), "ext4": Path("/dev/vdb")})
    made.set_up()
    return made


@pytest.fixture(scope="session")
def storage(server: Server, tmp_path_factory: pytest.TempPathFactory) -> OverNfs:  # type: ignore[override]
    made = OverNfs(server)
    made.start(tmp_path_factory.mktemp("storage"))
    return made


@pytest.fixture(scope="session")
def gateway(storage: OverNfs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """Patient: a server that restarts may take its time."""
    yield from _started(storage, tmp_path_factory.mktemp("patient"), 100)


@pytest.fixture(scope="session")
def hasty_gateway(storage: OverNfs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """Another one on the same mounts, with a short deadline for cuts."""
    yield from _started(storage, tmp_path_factory.mktemp("hasty"), HASTY_CUT_S)


def _started(storage: OverNfs, directory: Path, cut_timeout_s: float) -> Iterator[GatewayProcess]:
    made = GatewayProcess(directory, storage.pools(), call_timeout_s=100, cut_timeout_s=cut_timeout_s)
    try:
        made.start(_START_TIMEOUT_S)
        yield made
    finally:
        made.stop()


@pytest.fixture
def bench(storage: OverNfs, gateway: GatewayProcess, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Short words for the patient gateway; it must log nothing unexpected meanwhile."""
    with watched(SlowBench(storage, gateway), request) as made:
        yield made


@pytest.fixture
def hasty(storage: OverNfs, hasty_gateway: GatewayProcess, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The same for the other gateway."""
    with watched(SlowBench(storage, hasty_gateway), request) as made:
        yield made
