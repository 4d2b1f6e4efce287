"""`frostgate vm` on a real guest that writes all the time: taken, refused, reverted, deleted."""

import json
from pathlib import Path

from tests.conftest import Cloud
from tests.lab.disk import read_counter


def test_both_disks_hold_the_same_counter_and_the_guest_goes_on(cloud: Cloud) -> None:
    taken = cloud.snapshot("--id", "same")
    assert taken["consistency"] == "CONSISTENCY_FILESYSTEM"
    counters = [read_counter(Path(member["local_path"])) for member in taken["members"]]
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


def test_a_revert_refuses_a_running_vm_and_stops_it_when_told(cloud: Cloud) -> None:
    cloud.write_note(b"whole", "vda")
    assert cloud.vm("snapshot", "web1", "--id", "before").returncode == 0
    cloud.machine.write_file("/mnt/vda/note", b"damaged")
    refused = cloud.vm("revert", "web1", "before", "--yes")
    assert refused.returncode == 4
    assert "--stop" in refused.stderr
    done = cloud.vm("revert", "web1", "before", "--yes", "--stop", "--safety-id", "after")
    assert done.returncode == 0, done.stderr
    cloud.machine.wait_agent()
    assert cloud.notes("vda") == [b"whole"]
    assert cloud.vm("delete", "before", "after", "missing", "--yes").returncode == 0
    assert [path.name for path in (cloud.pool / ".frostgate").iterdir()] == [".lock"]
