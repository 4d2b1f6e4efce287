"""The lab itself: a guest on an XFS pool writes, freezes, thaws and shuts down, seen from outside."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import state
from tests.lab.disk import create_disk, read_counter
from tests.lab.filesystems import mount_filesystem
from tests.lab.hypervisor import Hypervisor
from tests.lab.machine import Disk, Machine

MIB = 1 << 20


@pytest.fixture(scope="module")
def lab() -> Iterator[Path]:
    yield state.prepare()
    state.release()


@pytest.fixture(scope="module")
def hypervisor(lab: Path) -> Iterator[Hypervisor]:
    with Hypervisor(name="smoke") as running:
        yield running


@pytest.fixture(scope="module")
def pool(lab: Path) -> Iterator[Path]:
    with mount_filesystem("xfs", lab / "smoke-pool", 2048 * MIB) as filesystem:
        yield filesystem.directory


@pytest.fixture(scope="module")
def machine(hypervisor: Hypervisor, pool: Path) -> Iterator[Machine]:
    disks = [
        Disk(create_disk(pool / "a.raw", 256 * MIB, "ext4")),
        Disk(create_disk(pool / "b.raw", 512 * MIB, "xfs")),
    ]
    guest = Machine(hypervisor, "smoke", disks, writer=True, hook=True)
    try:
        guest.start()
        guest.wait_agent()
        yield guest
    finally:
        guest.undefine()


def test_the_writer_counts(machine: Machine) -> None:
    first = machine.wait_tick()
    assert machine.wait_tick(beyond=first.number + 10).uptime_s > first.uptime_s


def test_freeze_stops_the_writer_and_thaw_lets_it_go(machine: Machine, pool: Path) -> None:
    machine.wait_tick()
    assert machine.domain.fsFreeze() == 2
    try:
        assert machine.fsfreeze_status() == "frozen"
        time.sleep(0.2)  # the console's last bytes
        frozen_at = machine.last_tick()
        assert frozen_at is not None
        copies = [shutil.copy(pool / name, pool / f"copy-{name}") for name in ("a.raw", "b.raw")]
        time.sleep(1)
        assert machine.last_tick() == frozen_at
    finally:
        assert machine.domain.fsThaw() == 2
    assert machine.fsfreeze_status() == "thawed"
    assert [read_counter(Path(copy)) for copy in copies] == [frozen_at.number] * 2
    machine.wait_tick(beyond=frozen_at.number)


def test_files_and_programs_of_the_guest_are_reachable(machine: Machine) -> None:
    machine.write_file("/mnt/vdb/note", b"frost\0gate")
    assert machine.read_file("/mnt/vdb/note") == b"frost\0gate"
    assert machine.exec(["/bin/sh", "-c", "echo out; exit 3"]) == (3, "out\n")


def test_the_counter_survives_a_shutdown(machine: Machine, pool: Path) -> None:
    machine.domain.shutdown()
    machine.wait_off()
    counters = [read_counter(pool / name) for name in ("a.raw", "b.raw")]
    last = machine.last_tick()
    assert last is not None
    assert last.number <= counters[1] <= counters[0] <= last.number + 1
    machine.domain.create()
    machine.wait_tick(beyond=counters[0])
