"""`frostgate vm` on a real guest that writes all the time: taken, refused, reverted, and thawed when we are killed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from tests.e2e.conftest import Cloud
from tests.gateway_process import FROSTGATE
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


def test_kill_9_of_the_coordinator_leaves_no_frozen_guest_and_no_snapshot(cloud: Cloud) -> None:
    """The gateway is stopped (SIGSTOP), so that the cut hangs while the guest is frozen; then the coordinator dies."""
    environment = {**cloud.gateway.environment, "LIBVIRT_DEFAULT_URI": cloud.hypervisor.uri}
    command = [FROSTGATE, "vm", "snapshot", "web1", "--id", "killed", "--max-freeze", "4"]
    gateway = cloud.gateway.pid
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as coordinator:
        deadline = time.monotonic() + 30
        while not (cloud.pool / ".frostgate" / "killed").exists():
            assert time.monotonic() < deadline
            assert coordinator.poll() is None
            time.sleep(0.002)
        time.sleep(0.02)  # the reservation is written; the freeze takes a tenth of a second
        os.kill(gateway, signal.SIGSTOP)
        try:
            while cloud.machine.fsfreeze_status() != "frozen":
                assert time.monotonic() < deadline
                time.sleep(0.01)
            coordinator.kill()
            killed = time.monotonic()
            frozen_at = cloud.machine.last_tick()
            assert frozen_at is not None
            cloud.machine.wait_tick(beyond=frozen_at.number + 2, timeout_s=10)
            assert time.monotonic() - killed < 5  # max-freeze + 1 s
        finally:
            os.kill(gateway, signal.SIGCONT)
    cloud.gateway.kill()
    cloud.gateway.start()
    deadline = time.monotonic() + 10
    while (cloud.pool / ".frostgate").exists():
        assert time.monotonic() < deadline, os.listdir(cloud.pool / ".frostgate")
        time.sleep(0.05)
    assert cloud.gateway.cli("snapshot", "list", "--output", "json").stdout.strip() == "[]"
    assert cloud.gateway.cli("volumes", "fast/a.raw").returncode == 0
    assert cloud.machine.fsfreeze_status() == "thawed"
