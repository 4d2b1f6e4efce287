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


def test_a_guest_that_thawed_before_the_cut_was_done_keeps_no_snapshot(cloud: Cloud) -> None:
    """Somebody thaws the guest while the gateway hangs in the cut."""
    environment = {**cloud.gateway.environment, "LIBVIRT_DEFAULT_URI": cloud.hypervisor.uri}
    command = [FROSTGATE, "vm", "snapshot", "web1", "--id", "thawed", "--max-freeze", "10"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as coordinator:
        deadline = time.monotonic() + 30
        while not (cloud.pool / ".frostgate" / "thawed").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(cloud.gateway.pid, signal.SIGSTOP)
        try:
            while cloud.machine.fsfreeze_status() != "frozen":
                assert time.monotonic() < deadline
                time.sleep(0.01)
            cloud.machine.domain.fsThaw()
        finally:
            os.kill(cloud.gateway.pid, signal.SIGCONT)
        _, said = coordinator.communicate(timeout=30)
    assert coordinator.returncode == 6, said
    assert "still were when the cut was done" in said
    assert not (cloud.pool / ".frostgate").exists()
    assert cloud.machine.fsfreeze_status() == "thawed"
    assert cloud.gateway.cli("snapshot", "show", "thawed").returncode == 3


def test_max_freeze_thaws_the_guest_while_the_gateway_hangs(cloud: Cloud) -> None:
    environment = {**cloud.gateway.environment, "LIBVIRT_DEFAULT_URI": cloud.hypervisor.uri}
    command = [FROSTGATE, "vm", "snapshot", "web1", "--id", "slow", "--max-freeze", "2"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as coordinator:
        deadline = time.monotonic() + 30
        while not (cloud.pool / ".frostgate" / "slow").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(cloud.gateway.pid, signal.SIGSTOP)
        try:
            while cloud.machine.fsfreeze_status() != "frozen":
                assert time.monotonic() < deadline
                time.sleep(0.01)
            frozen = time.monotonic()
            tick = cloud.machine.last_tick()
            assert tick is not None
            cloud.machine.wait_tick(beyond=tick.number + 2, timeout_s=10)
            assert time.monotonic() - frozen < 3  # max-freeze + 1 s
        finally:
            os.kill(cloud.gateway.pid, signal.SIGCONT)
        _, said = coordinator.communicate(timeout=60)
    assert coordinator.returncode == 6, said
    assert cloud.machine.fsfreeze_status() == "thawed"
    assert cloud.gateway.cli("snapshot", "show", "slow").returncode == 3


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
