"""The simulator's calls, by StorPool's own bindings, which check every request and answer."""

import functools
import time
from typing import Any

import pytest
from storpool import spapi

from tests.lab.storpool import CLIENT, TEMPLATE, StorpoolSim
from tests.unit.storpool_sim.conftest import MIB, names, refusal
from tests.waiting import wait

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


def test_volumes_and_snapshots_go_by_name_and_by_global_id(sim: StorpoolSim, name: str) -> None:
    api = sim.api()
    unnamed = api.volumeCreate({"size": MIB, "template": TEMPLATE, "tags": {"a": "1", "b": "2"}})
    assert unnamed.name == f"~{unnamed.globalId}"
    sim.create(name, MIB, attach=False)
    sim.create(f"{name}-2", MIB, attach=False)
    by_name = api.volumeList(name)[0]
    assert api.volumeList(f"~{by_name.globalId}")[0].name == name
    made = api.snapshotCreateGroup(
        {
            "tags": {"all": "yes"},
            "volumes": [
                {"volume": f"~{unnamed.globalId}", "tags": {"one": "1"}},
                {"volume": name},
                {"volume": f"{name}-2", "name": f"{name}-s"},
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


def test_snapshots_go_by_their_date_and_when_nothing_is_bound_to_them(sim: StorpoolSim, name: str) -> None:
    api = sim.api()
    sim.create(name, MIB, attach=False)
    api.snapshotCreate(name, {"name": f"{name}-late", "deleteAfter": 1})
    api.snapshotCreate(name, {"name": f"{name}-bound", "bind": True})
    api.volumeDelete(name)
    wait(lambda: not {f"{name}-late", f"{name}-bound"} & names(api.snapshotsList()))


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
