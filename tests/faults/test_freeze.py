"""The coordinator killed, the gateway hung, the guard dead: the guest runs again and nothing is left."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import psutil
import pytest

from tests.conftest import Cloud
from tests.gateway_process import FROSTGATE
from tests.holding_proxy import HoldingProxy


@contextmanager
def stuck(cloud: Cloud, tmp_path: Path, group: str, max_freeze: float) -> Iterator[tuple[Popen[str], HoldingProxy]]:
    """`frostgate vm snapshot` with the guest frozen and the cut hanging."""
    with HoldingProxy(cloud.gateway.address, tmp_path / "proxy.sock", "CreateGroupSnapshot") as proxy:
        environment = {
            **cloud.gateway.environment,
            "LIBVIRT_DEFAULT_URI": cloud.hypervisor.uri,
            "FROSTGATE_ADDRESS": proxy.address,
        }
        command = [FROSTGATE, "vm", "snapshot", "web1", "--id", group, "--max-freeze", str(max_freeze)]
        with Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as coordinator:
            assert proxy.held.wait(30)
            assert cloud.machine.fsfreeze_status() == "frozen"
            yield coordinator, proxy


def frozen_tick(cloud: Cloud) -> int:
    time.sleep(0.1)  # the console's last bytes
    tick = cloud.machine.last_tick()
    assert tick is not None
    return tick.number


def assert_nothing_is_left(cloud: Cloud, group: str) -> None:
    deadline = time.monotonic() + 10
    while (left := os.listdir(cloud.pool / ".frostgate")) != [".lock"]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert cloud.gateway.cli("snapshot", "show", group).returncode == 3
    assert cloud.machine.fsfreeze_status() == "thawed"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_coordinator_leaves_no_frozen_guest_and_no_snapshot(
    cloud: Cloud, tmp_path: Path, number: signal.Signals
) -> None:
    with stuck(cloud, tmp_path, "killed", 4) as (coordinator, _):
        tick = frozen_tick(cloud)
        coordinator.send_signal(number)
        killed = time.monotonic()
        cloud.machine.wait_tick(beyond=tick + 2, timeout_s=10)
        assert time.monotonic() - killed < 5  # max-freeze + 1 s
        coordinator.wait(30)
        cloud.gateway.kill()
        cloud.gateway.start()
    assert_nothing_is_left(cloud, "killed")
    assert cloud.vm("snapshot", "web1", "--id", "again").returncode == 0
    assert cloud.vm("delete", "again", "--yes").returncode == 0


def test_a_guest_that_thawed_before_the_cut_was_done_keeps_no_snapshot(cloud: Cloud, tmp_path: Path) -> None:
    with stuck(cloud, tmp_path, "thawed", 10) as (coordinator, proxy):
        cloud.machine.domain.fsThaw()
        proxy.release.set()
        _, said = coordinator.communicate(timeout=30)
    assert coordinator.returncode == 6, said
    assert "still were when the cut was done" in said
    assert_nothing_is_left(cloud, "thawed")


def test_max_freeze_thaws_the_guest_while_the_gateway_hangs(cloud: Cloud, tmp_path: Path) -> None:
    with stuck(cloud, tmp_path, "slow", 2) as (coordinator, _):
        frozen = time.monotonic()
        cloud.machine.wait_tick(beyond=frozen_tick(cloud) + 2, timeout_s=10)
        assert time.monotonic() - frozen < 3  # max-freeze + 1 s
        _, said = coordinator.communicate(timeout=60)
    assert coordinator.returncode == 6, said
    assert_nothing_is_left(cloud, "slow")


def test_a_dead_guard_does_not_keep_the_coordinator_from_thawing(cloud: Cloud, tmp_path: Path) -> None:
    with stuck(cloud, tmp_path, "unguarded", 5) as (coordinator, proxy):
        for child in psutil.Process(coordinator.pid).children():
            child.kill()
        proxy.release.set()
        coordinator.communicate(timeout=30)
    assert cloud.machine.fsfreeze_status() == "thawed"
    assert cloud.vm("delete", "unguarded", "--yes").returncode == 0


def test_two_snapshots_of_one_vm_at_once_do_not_thaw_each_other(cloud: Cloud) -> None:
    environment = {**cloud.gateway.environment, "LIBVIRT_DEFAULT_URI": cloud.hypervisor.uri}
    names = ["at-once-a", "at-once-b", "at-once-c"]
    running = [
        Popen([FROSTGATE, "vm", "snapshot", "web1", "--id", name], env=environment, stderr=subprocess.PIPE, text=True)
        for name in names
    ]
    outcomes = [(process.communicate(timeout=60)[1], process.returncode) for process in running]
    assert all(code == 0 or "frozen already" in said for said, code in outcomes), outcomes
    assert any(code == 0 for _, code in outcomes)
    assert cloud.machine.fsfreeze_status() == "thawed"
    assert cloud.vm("delete", *names, "--yes").returncode == 0
