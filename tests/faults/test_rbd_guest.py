"""Parts of a real cluster that hang while a guest runs on it: it is never left frozen, and nothing is left."""

import subprocess
import time
from pathlib import Path
from subprocess import Popen

import libvirt
import pytest

from tests.gateway_process import FROSTGATE
from tests.holding_proxy import HoldingProxy
from tests.lab.ceph import Daemon
from tests.rbd_cloud import RbdCloud
from tests.waiting import wait


def wait_thawed(rbd: RbdCloud, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if rbd.machine.fsfreeze_status() == "thawed":
                return
        except libvirt.libvirtError:  # the agent does not answer while a freeze or thaw is under way
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def freezes(rbd: RbdCloud) -> int:
    """How often the guest was frozen: the agent's hook leaves a mark each time."""
    return int(rbd.machine.exec(["/bin/sh", "-c", "cat /run/freezes 2>/dev/null | wc -l"])[1])


def test_a_monitor_that_hangs_during_prepare_freezes_nobody(rbd: RbdCloud) -> None:
    before = freezes(rbd)
    rbd.cluster.pause("mon")
    try:
        refused = rbd.vm("snapshot", "web1", "--id", "no-monitor")
        assert refused.returncode != 0
        assert freezes(rbd) == before
    finally:
        rbd.cluster.resume("mon")
    wait(rbd.is_clean, timeout_s=90, every_s=0.5)
    assert rbd.vm("snapshot", "web1", "--id", "monitor").returncode == 0
    assert freezes(rbd) == before + 1
    assert rbd.vm("delete", "monitor", "--yes").returncode == 0


@pytest.mark.parametrize("daemon", ["mon", "osd"])
def test_a_cluster_that_hangs_during_the_cut(rbd: RbdCloud, tmp_path: Path, daemon: Daemon) -> None:
    group = f"hung-{daemon}"
    excluded = ["--exclude", "vdd"]
    with HoldingProxy(rbd.gateway.address, tmp_path / "proxy.sock", "CreateGroupSnapshot") as proxy:
        environment = {
            **rbd.gateway.environment,
            "LIBVIRT_DEFAULT_URI": rbd.hypervisor.uri,
            "FROSTGATE_ADDRESS": proxy.address,
        }
        command = [FROSTGATE, "vm", "snapshot", "web1", "--id", group, "--max-freeze", "3", *excluded]
        with Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as coordinator:
            assert proxy.held.wait(30)
            rbd.cluster.pause(daemon)
            try:
                proxy.release.set()
                if daemon == "mon":  # without the OSD the guest's own disks hang, and its agent with them
                    wait_thawed(rbd, 6)
                time.sleep(5)
            finally:
                rbd.cluster.resume(daemon)
            wait_thawed(rbd, 20)
            _, said = coordinator.communicate(timeout=90)
    assert coordinator.returncode != 0, said
    wait(rbd.is_clean, timeout_s=90, every_s=0.5)
    assert rbd.gateway.cli("snapshot", "show", group).returncode == 3
    tick = rbd.machine.last_tick()
    assert tick
    rbd.machine.wait_tick(beyond=tick.number)
    assert rbd.vm("snapshot", "web1", "--id", group, *excluded).returncode == 0
    assert rbd.vm("delete", group, "--yes").returncode == 0
