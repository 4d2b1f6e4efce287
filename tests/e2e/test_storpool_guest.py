"""`frostgate vm` on a real guest whose disks are volumes of a simulated StorPool cluster, attached to this host."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.gateway_process import GatewayProcess
from tests.storpool_cloud import StorpoolCloud, storpool_cloud
from tests.waiting import wait


@pytest.fixture(scope="module")
def storpool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorpoolCloud]:
    with storpool_cloud(tmp_path_factory.mktemp("storpool")) as made:
        yield made


def test_a_snapshot_of_a_running_guest_is_one_instant(storpool: StorpoolCloud, tmp_path: Path) -> None:
    storpool.cluster.forget_calls()
    taken = storpool.snapshot("--max-freeze", "60", "--id", "first")
    assert taken["consistency"] == "CONSISTENCY_FILESYSTEM"
    assert storpool.cluster.calls()["VolumesGroupSnapshot"] == 1
    seen = storpool.counters_in(taken, tmp_path)
    assert len(set(seen)) == 1
    storpool.machine.wait_tick(beyond=seen[0])
    assert storpool.machine.fsfreeze_status() == "thawed"
    assert storpool.vm("delete", "first", "--yes").returncode == 0
    assert storpool.is_clean()


def test_volumes_of_one_cut_need_no_freeze_to_share_an_instant(storpool: StorpoolCloud) -> None:
    storpool.snapshot("--max-freeze", "60", "--id", "live", "--quiesce", "none")
    assert storpool.vm("delete", "live", "--yes").returncode == 0
    assert storpool.is_clean()


def test_a_cut_whose_answer_is_lost_still_is_the_frozen_guests(storpool: StorpoolCloud, tmp_path: Path) -> None:
    storpool.cluster.inject("VolumesGroupSnapshot", "cut-after")
    taken = storpool.snapshot("--max-freeze", "60", "--id", "lost")
    assert taken["consistency"] == "CONSISTENCY_FILESYSTEM"
    assert len(set(storpool.counters_in(taken, tmp_path))) == 1
    assert storpool.vm("delete", "lost", "--yes").returncode == 0
    assert storpool.is_clean()


def test_a_damaged_file_comes_back_and_the_volumes_are_attached_again(storpool: StorpoolCloud) -> None:
    storpool.write_note(b"whole", "vda", "vdc")
    storpool.snapshot("--max-freeze", "60", "--id", "before")
    storpool.write_note(b"damaged", "vda", "vdc")
    running = storpool.vm("revert", "web1", "before", "--yes")
    assert running.returncode == 4, running.stderr
    done = storpool.vm("revert", "web1", "before", "--yes", "--stop", "--safety-id", "after")
    assert done.returncode == 0, done.stderr
    storpool.machine.wait_agent()
    assert storpool.notes("vda", "vdc") == [b"whole", b"whole"]
    assert storpool.vm("delete", "before", "after", "--yes").returncode == 0
    assert storpool.is_clean()


def test_where_it_may_not_detach_a_revert_names_the_client(storpool: StorpoolCloud, tmp_path: Path) -> None:
    with GatewayProcess(tmp_path / "strict", {"sp": storpool.cluster.pool()}) as gateway:
        strict = replace(storpool, gateway=gateway)
        strict.snapshot("--max-freeze", "60", "--id", "strict")
        refused = strict.vm("revert", "web1", "strict", "--yes", "--stop")
        assert refused.returncode == 4
        assert "StorPool client 1" in refused.stderr
        storpool.machine.wait_agent()
        assert strict.vm("delete", "strict", "--yes").returncode == 0
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
    storpool.snapshot("--max-freeze", "60", "--id", "well")
    assert storpool.vm("delete", "well", "--yes").returncode == 0
    # also of a cut that was carried out when nobody wanted it any more
    wait(storpool.is_clean, timeout_s=120, every_s=0.5)
