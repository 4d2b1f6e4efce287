"""`frostgate vm` on a real guest that writes all the time: taken, refused, reverted, and thawed when we are killed."""

import json
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

from tests.e2e.conftest import Cloud
from tests.gateway_process import FROSTGATE
from tests.holding_proxy import HoldingProxy
from tests.lab.disk import read_counter


def test_both_disks_hold_the_same_counter_and_the_guest_goes_on(cloud: Cloud) -> None:
    done = cloud.vm("snapshot", "web1", "--id", "same", "--output", "json")
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    assert taken["group_snapshot"]["consistency"] == "CONSISTENCY_FILESYSTEM"
    counters = [read_counter(Path(member["local_path"])) for member in taken["group_snapshot"]["members"]]
    assert len(set(counters)) == 1
    assert cloud.machine.fsfreeze_status() == "thawed"
    cloud.machine.wait_tick(beyond=counters[0])
    assert cloud.vm("delete", "same", "--yes").returncode == 0


def test_a_snapshot_that_cannot_be_made_leaves_the_guest_alone(cloud: Cloud) -> None:
    assert cloud.vm("snapshot", "no-such-vm").returncode == 3
    assert cloud.vm("snapshot", "web1", "--quiesce", "none").returncode == 6
    assert cloud.vm("snapshot", "web1", "--exclude", "vdz").returncode == 3
    assert cloud.vm("revert", "web1", "missing", "--yes").returncode == 3
    assert cloud.vm("snapshot", "web1", "--id", "a..b").returncode == 2
    assert cloud.machine.fsfreeze_status() == "thawed"
    assert json.loads(cloud.vm("list", "web1", "--output", "json").stdout) == []


def test_a_frozen_guest_is_found_and_not_frozen_again(cloud: Cloud) -> None:
    cloud.machine.domain.fsFreeze()
    try:
        refused = cloud.vm("snapshot", "web1")
        assert refused.returncode == 6
        assert "frozen already" in refused.stderr
        doctor = cloud.gateway.cli("doctor", env={"LIBVIRT_DEFAULT_URI": cloud.hypervisor.uri})
        assert doctor.returncode == 1
        assert "FROZEN" in doctor.stdout
    finally:
        assert cloud.vm("thaw", "web1").returncode == 0
    assert cloud.machine.fsfreeze_status() == "thawed"


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
    while (cloud.pool / ".frostgate").exists():
        assert time.monotonic() < deadline, os.listdir(cloud.pool / ".frostgate")
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


def test_a_revert_refuses_a_running_vm_and_stops_it_when_told(cloud: Cloud) -> None:
    cloud.machine.write_file("/mnt/vda/note", b"whole")
    cloud.machine.exec(["/bin/sh", "-c", "sync"])
    assert cloud.vm("snapshot", "web1", "--id", "before").returncode == 0
    cloud.machine.write_file("/mnt/vda/note", b"damaged")
    refused = cloud.vm("revert", "web1", "before", "--yes")
    assert refused.returncode == 4
    assert "--stop" in refused.stderr
    done = cloud.vm("revert", "web1", "before", "--yes", "--stop", "--safety-id", "after")
    assert done.returncode == 0, done.stderr
    cloud.machine.wait_agent()
    assert cloud.machine.read_file("/mnt/vda/note") == b"whole"
    assert cloud.vm("delete", "before", "after", "missing", "--yes").returncode == 0
    assert not (cloud.pool / ".frostgate").exists()
