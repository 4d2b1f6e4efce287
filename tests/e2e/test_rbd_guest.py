"""`frostgate vm` on a real guest that runs from RBD images, QEMU writing through its exclusive locks."""

import json
from pathlib import Path

from tests.lab.disk import read_counter
from tests.rbd_cloud import IMAGES, RbdCloud


def counters(rbd: RbdCloud, group: str, members: list[dict[str, object]], tmp_path: Path) -> list[int]:
    found = []
    for member in members:
        ref = member["volume"]
        assert isinstance(ref, dict)
        name = f"{ref['pool']}/{ref['volume']}"
        target = tmp_path / name.replace("/", "-")
        done = rbd.gateway.cli("snapshot", "read", group, name, "--to", target)
        assert done.returncode == 0, done.stderr
        found.append(read_counter(target))
    return found


def test_one_snapshot_over_two_rbd_pools_and_a_directory_is_one_instant(rbd: RbdCloud, tmp_path: Path) -> None:
    done = rbd.vm("snapshot", "web1", "--id", "mixed", "--output", "json")
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)["group_snapshot"]
    assert taken["consistency"] == "CONSISTENCY_FILESYSTEM"
    assert [member["mode"] for member in taken["members"]] == ["group", "group", "group", "clone"]
    seen = counters(rbd, "mixed", taken["members"], tmp_path)
    assert len(set(seen)) == 1
    rbd.machine.wait_tick(beyond=seen[0])
    assert rbd.machine.fsfreeze_status() == "thawed"
    assert [snapshot["namespace"]["group snap"] for snapshot in rbd.snapshots(IMAGES[0])] == ["cut"]
    assert rbd.cluster.rbd_json("group", "image", "ls", "vms/frostgate.mixed") == []
    assert rbd.vm("delete", "mixed", "--yes").returncode == 0
    assert rbd.is_clean()


def test_disks_of_one_group_need_no_freeze_to_share_an_instant(rbd: RbdCloud) -> None:
    done = rbd.vm("snapshot", "web1", "--id", "live", "--quiesce", "none", "--exclude", "vdc", "--exclude", "vdd")
    assert done.returncode == 0, done.stderr
    refused = rbd.vm("snapshot", "web1", "--quiesce", "none")
    assert refused.returncode == 6
    assert rbd.vm("delete", "live", "--yes").returncode == 0
    assert rbd.is_clean()


def test_a_damaged_file_comes_back(rbd: RbdCloud) -> None:
    for disk in ("vda", "vdd"):
        rbd.machine.write_file(f"/mnt/{disk}/note", b"whole")
    rbd.machine.exec(["/bin/sh", "-c", "sync"])
    assert rbd.vm("snapshot", "web1", "--id", "before").returncode == 0
    for disk in ("vda", "vdd"):
        rbd.machine.write_file(f"/mnt/{disk}/note", b"damaged")
    running = rbd.gateway.cli("snapshot", "revert", "before", "--yes")
    assert running.returncode != 0
    assert "in use by client." in running.stderr
    done = rbd.vm("revert", "web1", "before", "--yes", "--stop", "--safety-id", "after")
    assert done.returncode == 0, done.stderr
    rbd.machine.wait_agent()
    for disk in ("vda", "vdd"):
        assert rbd.machine.read_file(f"/mnt/{disk}/note") == b"whole"
    assert rbd.vm("delete", "before", "after", "--yes").returncode == 0
    assert rbd.is_clean()
