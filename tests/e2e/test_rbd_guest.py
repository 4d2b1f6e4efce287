"""`frostgate vm` on a real guest that runs from RBD images, QEMU writing through its exclusive locks."""

from pathlib import Path

from tests.rbd_cloud import IMAGES, RbdCloud


def test_one_snapshot_over_two_rbd_pools_and_a_directory_is_one_instant(rbd: RbdCloud, tmp_path: Path) -> None:
    taken = rbd.snapshot("--id", "mixed")
    assert taken["consistency"] == "CONSISTENCY_FILESYSTEM"
    assert [member["mode"] for member in taken["members"]] == ["group", "group", "group", "clone"]
    seen = rbd.counters_in(taken, tmp_path)
    assert len(set(seen)) == 1
    rbd.machine.wait_tick(beyond=seen[0])
    assert rbd.machine.fsfreeze_status() == "thawed"
    assert [snapshot["namespace"]["group snap"] for snapshot in rbd.snapshots(IMAGES[0])] == ["cut"]
    assert rbd.cluster.rbd_json("group", "image", "ls", "vms/frostgate.mixed") == []
    assert rbd.vm("delete", "mixed", "--yes").returncode == 0
    assert rbd.is_clean()


def test_disks_of_one_group_need_no_freeze_to_share_an_instant(rbd: RbdCloud) -> None:
    rbd.snapshot("--id", "live", "--quiesce", "none", "--exclude", "vdc", "--exclude", "vdd")
    refused = rbd.vm("snapshot", "web1", "--quiesce", "none")
    assert refused.returncode == 6
    assert rbd.vm("delete", "live", "--yes").returncode == 0
    assert rbd.is_clean()


def test_a_damaged_file_comes_back(rbd: RbdCloud) -> None:
    rbd.write_note(b"whole", "vda", "vdd")
    rbd.snapshot("--id", "before")
    rbd.write_note(b"damaged", "vda", "vdd")
    running = rbd.gateway.cli("snapshot", "revert", "before", "--yes")
    assert running.returncode != 0
    assert "in use by client." in running.stderr
    done = rbd.vm("revert", "web1", "before", "--yes", "--stop", "--safety-id", "after")
    assert done.returncode == 0, done.stderr
    rbd.machine.wait_agent()
    assert rbd.notes("vda", "vdd") == [b"whole", b"whole"]
    assert rbd.vm("delete", "before", "after", "--yes").returncode == 0
    assert rbd.is_clean()
