"""What simulated volumes and snapshots have in them, by their devices; calls by StorPool's own bindings."""

import itertools
import os
import subprocess
import threading
from contextlib import closing
from typing import Any

import pytest

from tests.lab.storpool import CLIENT, StorpoolSim
from tests.unit.storpool_sim.conftest import MIB, names, refusal, unused
from tests.waiting import wait


def contents(sim: StorpoolSim, snapshots: list[str], length: int) -> list[bytes]:
    """What snapshots have, read from their devices."""

    def reassign(change: dict[str, Any]) -> None:
        sim.api().volumesReassignWait({"reassign": [{"snapshot": f"~{found}", **change} for found in snapshots]})

    reassign({"ro": [CLIENT]})
    try:
        return [(sim.devices_by_id / snapshot).read_bytes()[:length] for snapshot in snapshots]
    finally:
        reassign({"detach": "all"})


def test_a_group_snapshot_keeps_the_bytes_and_a_revert_brings_them_back(sim: StorpoolSim) -> None:
    api = sim.api()
    first, second = sim.create("first", 8 * MIB), sim.create("second", 8 * MIB)
    first.write_bytes(b"one" * 1000)
    second.write_bytes(b"two" * 1000)
    made = api.snapshotCreateGroup({"volumes": [{"volume": "first"}, {"volume": "second"}]}).snapshots
    first.write_bytes(b"bad" * 1000)
    second.write_bytes(b"bad" * 1000)
    for volume in ("first", "second"):
        refused = refusal(lambda volume=volume: api.volumeRevert(volume, {"toSnapshot": "first@9"}))
        assert refused.name == "objectDoesNotExist"
        target = {"toSnapshot": f"~{made[0].snapshotGlobalId}"}
        refused = refusal(lambda volume=volume, target=target: api.volumeRevert(volume, target))
        assert refused.name == "busy"
        assert "client 1" in refused.desc
        sim.detach(volume)
    for volume, snapshot in zip(("first", "second"), made, strict=True):
        api.volumeRevert(volume, {"toSnapshot": f"~{snapshot.snapshotGlobalId}"})
        sim.attach(volume)
    assert first.read_bytes() == (b"one" * 1000).ljust(8 * MIB, b"\0")
    assert second.read_bytes() == (b"two" * 1000).ljust(8 * MIB, b"\0")


def test_a_group_is_one_instant_while_somebody_writes(sim: StorpoolSim) -> None:
    volumes = [next(unused) for _ in range(8)]
    files = [os.open(sim.create(volume, 4096), os.O_RDWR) for volume in volumes]
    ended, failed = threading.Event(), []

    def write() -> None:
        """The same number to every volume, one after the other."""
        try:
            for number in itertools.count():
                for file in files:
                    os.pwrite(file, number.to_bytes(8, "big"), 0)
                if ended.is_set():
                    return
        except OSError as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    groups = [
        sim.api().snapshotCreateGroup({"volumes": [{"volume": volume} for volume in volumes]}).snapshots
        for _ in range(40)
    ]
    ended.set()
    writer.join()
    for file in files:
        os.close(file)
    assert not failed
    seen = [
        [int.from_bytes(found) for found in contents(sim, [made.snapshotGlobalId for made in group], 8)]
        for group in groups
    ]
    for numbers in seen:
        assert sorted(numbers, reverse=True) == numbers, "a later write without an earlier one"
        assert numbers[0] - numbers[-1] <= 1
    assert len({numbers[0] for numbers in seen}) > 1, "nothing was written meanwhile"


def test_a_guest_writes_past_the_page_cache_and_its_flush_is_answered(sim: StorpoolSim, name: str) -> None:
    device = sim.create(name, 8 * MIB)
    commands = ["write -P 0x5a 1M 64k", "flush", "read -P 0x5a 1M 64k", "write -P 0xa5 512 512", "read -P 0 0 512"]
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-t", "none", *words, device], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verification failed" not in done.stdout
    with device.open("rb") as file:
        assert file.read(1024) == bytes(512) + b"\xa5" * 512
        file.seek(MIB)
        assert file.read(65536) == b"\x5a" * 65536


def test_a_device_ends_where_the_volume_ends_and_grows_with_it(sim: StorpoolSim, name: str) -> None:
    device = sim.create(name, MIB)
    file = os.open(device, os.O_RDWR)
    with pytest.raises(OSError, match="No space"):
        os.pwrite(file, b"x", MIB)
    assert os.pwrite(file, b"x" * 8192, MIB - 4096) == 4096
    os.close(file)
    assert refusal(lambda: sim.api().volumeUpdate(name, {"size": MIB // 2})).name == "invalidParam"
    sim.api().volumeUpdate(name, {"size": 2 * MIB})
    assert device.stat().st_size == 2 * MIB
    assert device.read_bytes()[MIB - 4096 :] == (b"x" * 4096).ljust(MIB + 4096, b"\0")


def test_attachments_are_what_was_asked_for(sim: StorpoolSim, name: str) -> None:
    api = sim.api()
    device = sim.create(name, MIB)
    sim.attach(name, client=2)
    held = {(found.client, found.rights) for found in api.attachmentsList() if found.volume == name}
    assert held == {(CLIENT, "rw"), (2, "rw")}
    assert refusal(lambda: sim.attach(name, client=77)).desc == "No such client registered"
    assert refusal(lambda: api.volumeDelete(name)).name == "busy"
    with device.open("r+b") as file:
        refused = refusal(lambda: sim.detach(name))
        assert (refused.name, refused.desc) == ("busy", f"'{name}' is open at client 1")
        assert device.exists()
        sim.detach(name, force=True)
        assert not device.is_symlink()
        sim.attach(name)
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(file.fileno(), 10, 0)
    sim.attach(name, rights="ro")
    with pytest.raises(OSError, match="Read-only"):
        device.open("r+b")
    assert device.read_bytes() == bytes(MIB)


def test_volumes_are_made_upon_snapshots_and_as_copies(sim: StorpoolSim, name: str) -> None:
    api = sim.api()
    device = sim.create(name, MIB)
    device.write_bytes(b"kept" * 1000)
    api.snapshotCreate(name, {"name": f"{name}-s"})
    copied = api.volumeCreate({"name": f"{name}-copy", "baseOn": name})
    device.write_bytes(b"lost" * 1000)
    api.volumeCreate({"name": f"{name}-clone", "parent": f"{name}-s", "size": 2 * MIB})
    for made in (f"{name}-copy", f"{name}-clone"):
        sim.attach(made)
        assert (sim.devices / made).read_bytes()[:4000] == b"kept" * 1000
    (sim.devices / f"{name}-clone").write_bytes(b"mine" * 1000)
    assert (sim.devices_by_id / copied.globalId).read_bytes()[:4000] == b"kept" * 1000
    assert device.read_bytes()[:4000] == b"lost" * 1000
    assert api.volumeList(f"{name}-clone")[0].parentName == f"{name}-s"
    assert refusal(lambda: api.volumeCreate({"size": MIB})).name == "invalidParam"
    assert refusal(lambda: api.volumeCreate({"size": MIB, "template": "none"})).name == "objectDoesNotExist"
    sim.detach(f"{name}-clone")
    api.volumeRevert(f"{name}-clone", {"toSnapshot": f"{name}-s"})
    assert api.volumeList(f"{name}-clone")[0].size == MIB


def test_a_deleted_snapshot_stays_listed_while_two_need_it_and_its_room_comes_back(sim: StorpoolSim, name: str) -> None:
    api = sim.api()
    device = sim.create(name, 8 * MIB)
    device.write_bytes(b"a" * 4 * MIB)
    free = api.volumeTemplatesStatus()[0].stored.free
    for _ in range(3):
        api.snapshotCreate(name, {"name": f"{name}-s"})
        device.write_bytes(b"b" * 4 * MIB)
        api.volumeCreate({"name": f"{name}-clone", "parent": f"{name}-s"})
        api.snapshotDelete(f"{name}-s")
        assert refusal(lambda: api.snapshotList(f"{name}-s")).name == "objectDoesNotExist"
        assert [found.deleted for found in api.snapshotsList() if found.name == f"{name}-s"] == [True]
        api.volumeDelete(f"{name}-clone")
        assert f"{name}-s" not in names(api.snapshotsList())
    wait(lambda: api.volumeTemplatesStatus()[0].stored.free >= free)
    assert device.read_bytes() == (b"b" * 4 * MIB).ljust(8 * MIB, b"\0")
    space = next(found for found in api.volumesSpace() if found.name == name)
    assert space.storedSize == 4 * MIB


def test_frozen_and_rebased_volumes_keep_their_bytes(sim: StorpoolSim, name: str) -> None:
    api = sim.api()
    device = sim.create(name, MIB)
    device.write_bytes(b"1" * 10000)
    api.snapshotCreate(name, {"name": f"{name}-s"})
    with closing(device.open("r+b")) as file:
        file.write(b"2" * 5000)
    api.volumeRebase(name, {})
    assert api.volumeList(name)[0].parentName == ""
    assert device.read_bytes()[:10000] == b"2" * 5000 + b"1" * 5000
    sim.detach(name)
    api.volumeFreeze(name, {})
    assert name in names(api.snapshotsList())
    assert contents(sim, [api.snapshotList(name)[0].globalId], 10000) == [b"2" * 5000 + b"1" * 5000]


def test_what_is_full_says_so(sim: StorpoolSim, name: str) -> None:
    device = sim.create(name, 8 * MIB)
    used = 4 * 1024 * MIB - sim.api().volumeTemplatesStatus()[0].stored.free
    sim.set_capacity(used + MIB)
    try:
        with device.open("r+b", buffering=0) as file:
            assert file.write(b"x" * MIB) == MIB
            with pytest.raises(OSError, match="No space"):
                file.write(b"x" * MIB)
            file.seek(0)
            assert file.write(b"y" * 4096) == 4096
        refused = refusal(lambda: sim.api().snapshotCreateGroup({"volumes": [{"volume": name}]}))
        assert refused.name == "insufficientResources"
    finally:
        sim.set_capacity(4 * 1024 * MIB)
