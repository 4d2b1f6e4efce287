"""The StorPool simulator through StorPool's own bindings, which check every request and answer."""

import functools
import itertools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from storpool import spapi

from tests.lab import state
from tests.lab.storpool import CLIENT, TEMPLATE, StorpoolSim

MIB = 1 << 20
NOT_SIMULATED = {
    "AllPeersActiveRequests",
    "ExportsList",
    "MaintenanceList",
    "RemoteBridgesList",
    "SnapshotsRemoteList",
    "VolumeBalancerSnapshotDiskSets",
    "VolumeBalancerVolumeDiskSets",
    "VolumeExportsList",
    "VolumesRemoteList",
    "iSCSIConfig",
    "iSCSISessionsInfo",
    "iSCSInterfacesInfo",
}
_names = (f"v{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def sim() -> Iterator[StorpoolSim]:
    with StorpoolSim("storpool-unit", other_cluster="backup=sim.c", capacity_gib=4) as made:
        yield made
        assert "Traceback" not in made.log()
    state.release()


@pytest.fixture
def name() -> str:
    """A name that nothing has."""
    return next(_names)


@pytest.fixture(autouse=True)
def _nothing_left_to_go_wrong(sim: StorpoolSim) -> Iterator[None]:
    yield
    sim.forget_faults()


def refusal(call: Callable[[], object]) -> spapi.ApiError:
    with pytest.raises(spapi.ApiError) as refused:
        call()
    error: spapi.ApiError = refused.value
    return error


def names(listed: list[Any]) -> set[str]:
    return {found.name for found in listed}


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
    volumes = [next(_names) for _ in range(8)]
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


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"volume": "missing"}, "objectDoesNotExist"),
        ({"volume": "group-none"}, "invalidParam"),
        ({"volume": "group-other", "name": "group-taken"}, "objectExists"),
        ({"volume": "group-other", "name": "group-new"}, "invalidParam"),
        ({"volume": "group-other", "name": "no such name!"}, "invalidParam"),
        ({"volume": "group-other", "tags": {"k": "x" * 200}}, "invalidParam"),
    ],
)
def test_a_group_with_an_error_makes_nothing(sim: StorpoolSim, second: dict[str, Any], reason: str) -> None:
    api = sim.api()
    if "group-none" not in names(api.volumesList()):
        for volume in ("group-none", "group-other", "group-taken"):
            sim.create(volume, MIB, attach=False)
    before = names(api.snapshotsList())
    asked = {"volumes": [{"volume": "group-none", "name": "group-new"}, second]}
    refused = refusal(lambda: api("POST", False, "VolumesGroupSnapshot", asked))
    assert refused.name == reason
    assert names(api.snapshotsList()) == before


def test_without_the_token_nothing_is_told(sim: StorpoolSim) -> None:
    stranger = spapi.Api(host="127.0.0.1", port=sim.port, auth="guessed", transientRetries=0)
    refused = refusal(stranger.volumesList)
    assert refused.status == 401
    assert refused.name == "authenticationFailed"


def test_every_list_is_as_the_bindings_want_it(sim: StorpoolSim, name: str) -> None:
    """The bindings hand out half an object when an answer is wrong: the types are asked here, and raise."""
    sim.create(name, MIB, tags={"some": "tag"})
    api = sim.api()
    api.snapshotCreate(name, {"name": f"{name}-snapshot"})
    answered = 0
    arguments = {"volumeName": name, "snapshotName": f"{name}-snapshot", "templateName": TEMPLATE, "clientId": CLIENT}
    arguments |= {"diskId": 101, "serverId": 1, "placementGroupName": "hdd"}
    for function, call in vars(spapi.Api).items():
        documented = getattr(call, "spDoc", None)
        if getattr(documented, "method", "") != "GET" or not set(documented.args) <= set(arguments):
            continue
        given = {argument: arguments[argument] for argument in documented.args}
        if documented.json is not None:
            given["json"] = None
        ask = getattr(api, function)
        if documented.query in NOT_SIMULATED:
            assert refusal(functools.partial(ask, **given)).name == "notSupported"
        else:
            call.__globals__["returns"](ask(**given, returnRawAPIData=True))
            answered += 1
    assert answered > 40


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


def test_volumes_and_snapshots_go_by_name_and_by_global_id(sim: StorpoolSim, name: str) -> None:
    api = sim.api()
    unnamed = api.volumeCreate({"size": MIB, "template": TEMPLATE, "tags": {"a": "1", "b": "2"}})
    assert unnamed.name == f"~{unnamed.globalId}"
    sim.create(name, MIB, attach=False)
    by_name = api.volumeList(name)[0]
    assert api.volumeList(f"~{by_name.globalId}")[0].name == name
    made = api.snapshotCreateGroup(
        {
            "tags": {"all": "yes"},
            "volumes": [
                {"volume": f"~{unnamed.globalId}", "tags": {"one": "1"}},
                {"volume": name},
                {"volume": "first", "name": f"{name}-s"},
            ],
        }
    ).snapshots
    assert made[0].snapshot == f"~{made[0].snapshotGlobalId}"
    assert made[1].snapshot.startswith(f"{name}@")
    assert made[2].snapshot == f"{name}-s"
    found = {snapshot.globalId: snapshot for snapshot in api.snapshotsList()}
    assert found[made[0].snapshotGlobalId].tags == {"all": "yes", "one": "1"}
    assert [found[each.snapshotGlobalId].autoName for each in made] == [True, True, False]
    assert found[made[1].snapshotGlobalId].onVolume == name
    assert api.volumeList(name)[0].parentName == made[1].snapshot
    api.snapshotUpdate(made[1].snapshot, {"rename": f"{name}-new", "tags": {"all": "", "x": "y"}})
    assert api.snapshotList(f"{name}-new")[0].tags == {"x": "y"}
    assert refusal(lambda: api.snapshotList(made[1].snapshot)).name == "objectDoesNotExist"
    assert refusal(lambda: api.volumeCreate({"name": f"{name}-s", "size": MIB, "template": TEMPLATE})).name == (
        "objectExists"
    )


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
    deadline = time.monotonic() + 60
    while api.volumeTemplatesStatus()[0].stored.free < free:
        assert time.monotonic() < deadline, "the room does not come back"
        time.sleep(0.05)
    assert device.read_bytes() == (b"b" * 4 * MIB).ljust(8 * MIB, b"\0")
    space = next(found for found in api.volumesSpace() if found.name == name)
    assert space.storedSize == 4 * MIB


def test_snapshots_go_by_their_date_and_when_nothing_is_bound_to_them(sim: StorpoolSim, name: str) -> None:
    api = sim.api()
    sim.create(name, MIB, attach=False)
    api.snapshotCreate(name, {"name": f"{name}-late", "deleteAfter": 1})
    api.snapshotCreate(name, {"name": f"{name}-bound", "bind": True})
    api.volumeDelete(name)
    deadline = time.monotonic() + 60
    while {f"{name}-late", f"{name}-bound"} & names(api.snapshotsList()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


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


def test_what_is_made_to_go_wrong_does_and_is_counted(sim: StorpoolSim, name: str) -> None:
    sim.create(name, MIB, attach=False)
    sim.create(f"{name}-2", MIB, attach=False)
    asked = {"volumes": [{"volume": name}, {"volume": f"{name}-2"}]}
    patient = sim.api(transientRetries=3, transientSleep=lambda retry: 0.01)

    def snapshots() -> int:
        return sum(found.createdFromGlobalId in ids for found in sim.api().snapshotsList())

    ids = {sim.api().volumeList(volume)[0].globalId for volume in (name, f"{name}-2")}
    sim.forget_calls()
    sim.inject("VolumesGroupSnapshot", "error", count=2, transient=True, name="busy")
    patient.snapshotCreateGroup(asked)
    assert (snapshots(), sim.calls()["VolumesGroupSnapshot"]) == (2, 3)
    sim.inject("snapshotCreateGroup", "error", name="weird", descr="so it is")
    assert refusal(lambda: sim.api().snapshotCreateGroup(asked)).desc == "so it is"
    sim.inject("Volumes*", "cut-before")
    with pytest.raises(OSError, match="closed connection"):
        sim.api().snapshotCreateGroup(asked)
    assert snapshots() == 2
    sim.inject("VolumesGroupSnapshot", "cut-after")
    with pytest.raises(OSError, match="closed connection"):
        sim.api().snapshotCreateGroup(asked)
    assert snapshots() == 4
    sim.inject("VolumesGroupSnapshot", "half")
    assert refusal(lambda: sim.api().snapshotCreateGroup(asked)).name == "internalError"
    assert snapshots() == 5
    sim.inject("VolumesList", "delay", delay_s=0.4)
    before = time.monotonic()
    sim.api().volumesList()
    assert time.monotonic() - before >= 0.4


def test_several_clusters_are_one_to_a_multicluster_call(sim: StorpoolSim, name: str) -> None:
    api, all_ = sim.api(), sim.api(multiCluster=True)
    sim.create(name, MIB, attach=False)
    api.volumeCreate({"name": f"{name}-far", "size": MIB, "template": TEMPLATE}, clusterName="backup")
    assert f"{name}-far" not in names(api.volumesList())
    assert f"{name}-far" in names(api.volumesList(clusterName="~sim.c"))
    listed = {found.name: found for found in all_.volumesList()}
    assert (listed[name].clusterName, listed[f"{name}-far"].clusterId) == ("sim", "sim.c")
    far = all_.snapshotCreate(f"{name}-far", {"tags": {"x": "y"}})
    assert far.snapshotGlobalId.startswith("sim.c.")
    all_.volumesReassignWait({"reassign": [{"volume": each, "rw": [CLIENT]} for each in (name, f"{name}-far")]})
    (sim.devices / f"{name}-far").write_bytes(b"far")
    assert {found.cluster for found in all_.attachmentsList()} == {"sim", "backup"}
    both = {"volumes": [{"volume": name}, {"volume": f"{name}-far"}]}
    assert refusal(lambda: all_.snapshotCreateGroup(both)).name == "invalidParam"
    assert refusal(lambda: api.volumesList(clusterName="nowhere")).name == "objectDoesNotExist"
    assert [found.name for found in api.clustersList()["clusters"]] == ["backup"]


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


def test_the_key_value_store_goes_by_versions(sim: StorpoolSim, name: str) -> None:
    api = sim.api()
    api.kvsCreate(name)
    api.kvsUpdate(name, {"set": {"a": "1", "b": "2"}})
    assert refusal(lambda: api.kvsUpdate(name, {"set": {"a": "3"}, "runIfVersionIs": 7})).name == (
        "runIfVersionIsMismatch"
    )
    api.kvsUpdate(name, {"set": {"a": ""}, "runIfVersionIs": 1})
    assert api.kvsList(name).pairs == {"b": "2"}
    api.kvsDelete(name)
    assert name not in api.kvsBuckets().buckets


def test_every_change_has_a_generation_of_its_own(sim: StorpoolSim, name: str) -> None:
    api = sim.api()
    first = api.volumeCreate({"name": name, "size": MIB, "template": TEMPLATE}).generation
    assert api.volumeUpdate(name, {"tags": {"a": "b"}}).generation > first
    assert {found.configStatus for found in api.clientsConfigDump()} == {"ok"}
