"""Guests that cannot be frozen: no agent, paused, off; and disks that are no part of a snapshot."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MIB, Cloud
from tests.lab import state
from tests.lab.disk import create_disk, read_counter
from tests.lab.filesystems import mount_filesystem
from tests.lab.machine import Disk, Machine


@pytest.fixture(scope="module")
def mute(cloud: Cloud) -> Iterator[Machine]:
    """A guest without an agent: two disks in the pool, one in no pool, and a CD-ROM."""
    outside = state.DEFAULT_STATE_DIR / "outside"
    disks = [Disk(create_disk(cloud.pool / f"mute-{letter}.raw", 256 * MIB, "ext4")) for letter in "ab"]
    iso = cloud.pool / "cd.iso"
    iso.write_bytes(bytes(MIB))
    with mount_filesystem("ext4", outside, 512 * MIB):
        strange = Disk(create_disk(outside / "strange.raw", 64 * MIB, "ext4"))
        cdrom = Disk(iso, readonly=True, device="cdrom")
        with Machine(cloud.hypervisor, "mute", [*disks, strange, cdrom], agent=False).running() as machine:
            yield machine
    for disk in (*disks, Disk(iso)):
        disk.path.unlink()


@pytest.fixture
def taken(cloud: Cloud) -> Iterator[str]:
    yield "quiesced"
    assert cloud.vm("delete", "quiesced", "--yes").returncode == 0


def snapshot(cloud: Cloud, *words: str) -> dict[str, object]:
    done = cloud.vm("snapshot", "mute", "--id", "quiesced", "--exclude", "vdc", "--output", "json", *words)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def counters(taken: dict[str, object]) -> list[int]:
    members = taken["group_snapshot"]["members"]  # type: ignore[index]
    return [read_counter(Path(member["local_path"])) for member in members]


def test_a_disk_in_no_pool_stops_the_snapshot_by_name(cloud: Cloud, mute: Machine) -> None:
    refused = cloud.vm("snapshot", "mute", "--quiesce", "preferred")
    assert refused.returncode == 3
    assert "vdc" in refused.stderr
    assert "--exclude" in refused.stderr


def test_required_refuses_a_guest_without_agent(cloud: Cloud, mute: Machine) -> None:
    refused = cloud.vm("snapshot", "mute", "--exclude", "vdc")
    assert refused.returncode == 6
    assert "--quiesce preferred" in refused.stderr


def test_preferred_pauses_a_guest_without_agent_and_says_crash(cloud: Cloud, mute: Machine, taken: str) -> None:
    done = snapshot(cloud, "--quiesce", "preferred")
    assert done["group_snapshot"]["consistency"] == "CONSISTENCY_CRASH"  # type: ignore[index]
    assert done["window"]["window_s"] > 0  # type: ignore[index]
    skipped = {entry["disk"]: entry["reason"] for entry in done["skipped"]}  # type: ignore[attr-defined]
    assert skipped == {"vdc": "is excluded", "hda": "is a cdrom"}
    first, second = counters(done)
    assert second <= first <= second + 1  # at an instant the later disk is at most one round behind
    assert mute.domain.isActive()
    mute.wait_tick(beyond=first + 2)


def test_none_takes_a_single_disk(cloud: Cloud, mute: Machine, taken: str) -> None:
    done = snapshot(cloud, "--quiesce", "none", "--exclude", "vdb")
    assert done["group_snapshot"]["consistency"] == "CONSISTENCY_CRASH"  # type: ignore[index]
    assert len(counters(done)) == 1


def test_a_paused_vm_stays_paused(cloud: Cloud, mute: Machine, taken: str) -> None:
    mute.domain.suspend()
    try:
        done = snapshot(cloud)
        assert done["group_snapshot"]["consistency"] == "CONSISTENCY_CRASH"  # type: ignore[index]
        assert mute.domain.state()[0] == 3  # VIR_DOMAIN_PAUSED
    finally:
        mute.domain.resume()


def test_a_vm_that_is_off_needs_nothing(cloud: Cloud, mute: Machine, taken: str) -> None:
    mute.domain.shutdown()
    mute.wait_off()
    done = snapshot(cloud)
    assert done["group_snapshot"]["consistency"] == "CONSISTENCY_FILESYSTEM"  # type: ignore[index]
    found = counters(done)
    assert found[0] - found[1] in (0, 1)
    assert not mute.domain.isActive()
