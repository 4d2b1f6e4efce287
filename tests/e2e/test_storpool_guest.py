"""`frostgate vm` on a real guest whose disks are volumes of a simulated StorPool cluster, attached to this host."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway_process import GatewayProcess
from tests.lab.disk import read_counter
from tests.storpool_cloud import StorpoolCloud, storpool_cloud


@pytest.fixture(scope="module")
def storpool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorpoolCloud]:
    with storpool_cloud(tmp_path_factory.mktemp("storpool")) as made:
        yield made


def counters(storpool: StorpoolCloud, group: str, volumes: list[str], tmp_path: Path) -> list[int]:
    """What the guest had counted to on each disk."""
    found = []
    for volume in volumes:
        target = tmp_path / volume
        done = storpool.gateway.cli("snapshot", "read", group, f"sp/{volume}", "--to", target)
        assert done.returncode == 0, done.stderr
        found.append(read_counter(target))
    return found


def test_a_snapshot_of_a_running_guest_is_one_instant(storpool: StorpoolCloud, tmp_path: Path) -> None:
    storpool.cluster.forget_calls()
    done = storpool.vm("snapshot", "web1", "--max-freeze", "60", "--id", "first", "--output", "json")
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)["group_snapshot"]
    assert taken["consistency"] == "CONSISTENCY_FILESYSTEM"
    assert storpool.cluster.calls()["VolumesGroupSnapshot"] == 1
    volumes = [member["volume"]["volume"] for member in taken["members"]]
    seen = counters(storpool, "first", volumes, tmp_path)
    assert len(set(seen)) == 1
    storpool.machine.wait_tick(beyond=seen[0])
    assert storpool.machine.fsfreeze_status() == "thawed"
    assert storpool.vm("delete", "first", "--yes").returncode == 0
    assert storpool.is_clean()


def test_volumes_of_one_cut_need_no_freeze_to_share_an_instant(storpool: StorpoolCloud) -> None:
    done = storpool.vm("snapshot", "web1", "--max-freeze", "60", "--id", "live", "--quiesce", "none")
    assert done.returncode == 0, done.stderr
    assert storpool.vm("delete", "live", "--yes").returncode == 0
    assert storpool.is_clean()


def test_a_cut_whose_answer_is_lost_still_is_the_frozen_guests(storpool: StorpoolCloud, tmp_path: Path) -> None:
    storpool.cluster.inject("VolumesGroupSnapshot", "cut-after")
    done = storpool.vm("snapshot", "web1", "--max-freeze", "60", "--id", "lost", "--output", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["group_snapshot"]["consistency"] == "CONSISTENCY_FILESYSTEM"
    assert len(set(counters(storpool, "lost", ["web1-root", "web1-data", "web1-logs"], tmp_path))) == 1
    assert storpool.vm("delete", "lost", "--yes").returncode == 0
    assert storpool.is_clean()


def test_a_damaged_file_comes_back_and_the_volumes_are_attached_again(storpool: StorpoolCloud) -> None:
    for disk in ("vda", "vdc"):
        storpool.machine.write_file(f"/mnt/{disk}/note", b"whole")
    storpool.machine.exec(["/bin/sh", "-c", "sync"])
    assert storpool.vm("snapshot", "web1", "--max-freeze", "60", "--id", "before").returncode == 0
    for disk in ("vda", "vdc"):
        storpool.machine.write_file(f"/mnt/{disk}/note", b"damaged")
    storpool.machine.exec(["/bin/sh", "-c", "sync"])
    running = storpool.vm("revert", "web1", "before", "--yes")
    assert running.returncode == 4, running.stderr
    done = storpool.vm("revert", "web1", "before", "--yes", "--stop", "--safety-id", "after")
    assert done.returncode == 0, done.stderr
    storpool.machine.wait_agent()
    for disk in ("vda", "vdc"):
        assert storpool.machine.read_file(f"/mnt/{disk}/note") == b"whole"
    assert storpool.vm("delete", "before", "after", "--yes").returncode == 0
    assert storpool.is_clean()


def test_where_it_may_not_detach_a_revert_names_the_client(storpool: StorpoolCloud, tmp_path: Path) -> None:
    with GatewayProcess(tmp_path / "strict", {"sp": storpool.cluster.pool()}) as strict:
        environment = {"LIBVIRT_DEFAULT_URI": storpool.hypervisor.uri}
        assert (
            strict.cli("vm", "snapshot", "web1", "--max-freeze", "60", "--id", "strict", env=environment).returncode
            == 0
        )
        refused = strict.cli("vm", "revert", "web1", "strict", "--yes", "--stop", env=environment)
        assert refused.returncode == 4
        assert "StorPool client 1" in refused.stderr
        storpool.machine.wait_agent()
        assert strict.cli("vm", "delete", "strict", "--yes", env=environment).returncode == 0
    assert storpool.is_clean()


def test_a_cluster_that_is_slow_to_cut_never_leaves_the_guest_frozen(storpool: StorpoolCloud) -> None:
    tick = storpool.machine.last_tick()
    assert tick
    storpool.cluster.inject("VolumesGroupSnapshot", "delay", delay_s=30)
    failed = storpool.vm("snapshot", "web1", "--max-freeze", "5", "--id", "slow")
    assert failed.returncode != 0
    storpool.machine.wait_tick(beyond=tick.number)
    assert storpool.machine.fsfreeze_status() == "thawed"
    storpool.cluster.forget_faults()
    assert storpool.vm("snapshot", "web1", "--max-freeze", "60", "--id", "well").returncode == 0
    assert storpool.vm("delete", "well", "--yes").returncode == 0
    deadline = time.monotonic() + 120
    while not storpool.is_clean():  # also of a cut that was carried out when nobody wanted it any more
        assert time.monotonic() < deadline
        time.sleep(0.5)
