"""What only RBD can be or do: groups of others, crashes between the cut and the journal, the trash, odd layouts."""

import json
import time
from typing import Any

import grpc
import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import pool_pb2, volume_pb2
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.ceph import Ceph
from tests.conformance.conftest import Bench, refused
from tests.conformance.storages import MIB
from tests.gateway_process import GatewayProcess, reason_of

pytestmark = pytest.mark.parametrize("storage", ["ceph-group"], indirect=True)


def ceph(bench: Bench) -> Ceph:
    assert isinstance(bench.storage, Ceph)
    return bench.storage


def rbd(bench: Bench, *words: str) -> str:
    return ceph(bench).main.rbd(*words)


def rbd_json(bench: Bench, *words: str) -> Any:
    return ceph(bench).main.rbd_json(*words)


def test_an_image_in_somebody_elses_group_is_cut_beside_it(bench: Bench) -> None:
    theirs, ours, group = bench.volume(), bench.volume(), bench.id()
    rbd(bench, "group", "create", "vms/theirs")
    rbd(bench, "group", "image", "add", "vms/theirs", f"vms/{theirs}")
    try:
        before = bench.storage.digest(theirs)
        members = bench.take(group, theirs, ours).members
        assert [(member.mode, member.atomic) for member in members] == [("snapshot", False), ("group", True)]
        bench.storage.write(theirs, 0, b"later")
        assert bench.storage.member_digest(group, theirs) == before
        bench.revert(group)
        assert bench.storage.digest(theirs) == before
        assert [found["image"] for found in rbd_json(bench, "group", "image", "ls", "vms/theirs")] == [theirs]
    finally:
        rbd(bench, "group", "rm", "vms/theirs")


def test_images_leave_our_group_so_that_others_can_have_them(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    assert bench.take(group, volume).members[0].handle == f"vms/frostgate.{group}@cut"
    rbd(bench, "group", "create", "vms/theirs")
    rbd(bench, "group", "image", "add", "vms/theirs", f"vms/{volume}")
    rbd(bench, "group", "rm", "vms/theirs")
    for _ in range(2):
        assert bench.take(bench.id(), volume).members[0].mode == "group"


def test_a_gateway_killed_between_the_cut_and_the_outcome_leaves_nothing(own: Bench) -> None:
    volumes, group = [own.volume() for _ in range(2)], own.id()
    own.prepare(group, *volumes)
    own.gateway.kill()
    rbd(own, "group", "snap", "create", f"vms/frostgate.{group}@cut")  # as the cut does it
    own.gateway.start()
    own.wait_gone(group)
    assert not own.storage.exists(group)
    assert all(rbd_json(own, "snap", "ls", "--all", f"vms/{volume}") == [] for volume in volumes)


def test_an_image_snapshot_that_its_group_has_forgotten_goes_too(own: Bench) -> None:
    """librbd removes a group snapshot's record even when an image's snapshot could not be removed."""
    volume, group = own.volume(), own.id()
    own.prepare(group, volume)
    own.gateway.kill()
    rbd(own, "group", "snap", "create", f"vms/frostgate.{group}@cut")
    objects = ceph(own).main.rados("vms", "ls").split()
    for header in (name for name in objects if name.startswith("rbd_group_header.")):
        for key in ceph(own).main.rados("vms", "listomapkeys", header).split():
            if key.startswith("snapshot_"):
                ceph(own).main.rados("vms", "rmomapkey", header, key)
    own.gateway.start()
    own.wait_gone(group)
    assert rbd_json(own, "snap", "ls", "--all", f"vms/{volume}") == []


def test_reconcile_finds_what_a_crash_left_when_the_journal_is_lost(own: Bench) -> None:
    volume, left, kept = own.volume(), own.id("left"), own.id("kept")
    vm = pb.VmRecord(uuid=f"40000000-0000-0000-0000-{own.number:012d}", name="vm", domain_xml="<domain/>")
    taken = own.take(kept, volume, vm=vm, labels={"a": "b"})
    own.prepare(left, volume)
    own.gateway.kill()
    rbd(own, "group", "snap", "create", f"vms/frostgate.{left}@cut")
    outcome = own.gateway.rebuild_journal()
    assert outcome["removed"] == [left]
    assert outcome["restored"] == [kept]
    assert not own.storage.exists(left)
    own.gateway.start()
    assert own.get(kept).vm == taken.vm
    assert own.get(kept).labels == taken.labels


def test_a_client_that_was_blocklisted_connects_anew(own: Bench) -> None:
    def clients() -> set[str]:
        sessions = json.loads(ceph(own).main.ceph("tell", "mon.a", "sessions", "--format", "json"))
        found = [session["socket_addr"] for session in sessions if session["entity_name"] == "client.frostgate"]
        return {f"{address['addr']}/{address['nonce']}" for address in found}

    volume, others = own.volume(), clients()
    own.take(own.id(), volume)
    ours = clients() - others
    assert ours
    for address in ours:
        ceph(own).main.ceph("osd", "blocklist", "add", address)
    deadline = time.monotonic() + 30
    while True:
        try:
            own.take(own.id(), volume)
            break
        except (grpc.RpcError, AssertionError):
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_a_wrong_key_is_said_and_stalls_no_other_pool(bench: Bench, tmp_path: Any) -> None:
    keyring = tmp_path / "keyring"
    keyring.write_text("[client.frostgate]\n\tkey = AQA11ARrfLagJBAA1V0DzTtorU8sDSznbfPxYw==\n")
    pools = bench.storage.pools()
    pools["other"] = {**pools["main"], "keyring": str(keyring)}
    volume = bench.volume()
    with GatewayProcess(tmp_path / "gateway", pools) as gateway:
        listed = {pool.name: pool.health for pool in gateway.stub.ListPools(rpc.ListPoolsRequest()).pools}
        assert listed["other"].status == pool_pb2.PoolHealth.STATUS_UNAVAILABLE
        assert "client.frostgate" in listed["other"].message
        assert "AQA11" not in listed["other"].message
        assert listed["main"].status == pool_pb2.PoolHealth.STATUS_HEALTHY
        with pytest.raises(grpc.RpcError) as caught:
            gateway.stub.GetVolume(rpc.GetVolumeRequest(ref=bench.ref(volume, "other")))
        assert reason_of(caught.value) == "POOL_UNAVAILABLE"


@pytest.mark.expects_log("revert is half done and waits")
@pytest.mark.expects_log("record on the storage is behind the journal")
def test_an_osd_that_hangs_during_a_revert_only_delays_it(bench: Bench) -> None:
    volume, group = bench.volume(256 * MIB, pool="other", data=b"o" * 200 * MIB), bench.id()
    bench.take(group, ("other", volume))
    then = bench.storage.digest(volume, "other")
    bench.storage.write(volume, 0, b"d" * 150 * MIB, "other")
    safety = bench.id("safety")
    bench.stub.RevertGroupSnapshot(rpc.RevertGroupSnapshotRequest(id=group, safety_id=safety))
    for seen in bench.stub.WatchGroupSnapshot(rpc.WatchGroupSnapshotRequest(id=group)):
        if any(found.id == safety and found.state == pb.GROUP_SNAPSHOT_STATE_READY for found in bench.list()):
            break
        assert seen.group_snapshot.state == pb.GROUP_SNAPSHOT_STATE_REVERTING
    ceph(bench).other.pause("osd")
    try:
        time.sleep(7)
    finally:
        ceph(bench).other.resume("osd")
    outcome = bench.settled(group)
    assert outcome.revert.state == pb.Revert.STATE_DONE, outcome.revert
    assert bench.storage.digest(volume, "other") == then


def test_a_rollback_by_librbd_tells_how_far_it_is(bench: Bench) -> None:
    name, group = f"t{bench.number}-many.raw", bench.id()
    rbd(bench, "create", "--size", "256M", "--object-size", "64K", f"vms/{name}")
    try:
        bench.storage.write(name, 0, b"o" * 256 * MIB)
        then = bench.storage.digest(name)
        bench.take(group, name)
        bench.storage.write(name, 0, b"d" * 256 * MIB)
        bench.stub.RevertGroupSnapshot(rpc.RevertGroupSnapshotRequest(id=group, safety_id=bench.id("safety")))
        seen = [found.progress.done_bytes for found in bench.watch(group) if found.progress.total_bytes]
        assert any(0 < done < 256 * MIB for done in seen), seen
        assert seen == sorted(seen), seen
        assert bench.storage.digest(name) == then
        for found in reversed(bench.groups):
            bench.delete(found)
    finally:
        rbd(bench, "rm", "--no-progress", f"vms/{name}")


def test_sources_are_resolved_by_pool_namespace_and_monitor(bench: Bench) -> None:
    volume, other = bench.volume(), bench.volume(pool="other")
    monitor = f"127.0.0.1:{ceph(bench).main.ports[1]}"
    cases = [
        (f"vms/{volume}", [], ("main", volume)),
        (f"vms/{volume}", [monitor], ("main", volume)),
        (f"vms/{volume}", ["10.9.8.7:6789"], ("", "")),
        (f"vms/tenant/{other}", [], ("other", other)),
        (f"vms/tenant/{volume}", [], ("", "")),
        (f"nowhere/{volume}", [], ("", "")),
        ("vms/missing", [], ("", "")),
    ]
    sources = [
        volume_pb2.DiskSource(rbd=volume_pb2.RbdSource(name=name, monitors=monitors)) for name, monitors, _ in cases
    ]
    found = bench.stub.ResolveVolumes(rpc.ResolveVolumesRequest(sources=sources)).resolutions
    assert [(answer.volume.pool, answer.volume.volume) for answer in found] == [case[2] for case in cases], found


@pytest.mark.parametrize("layout", ["striped", "small objects", "no exclusive lock", "child of a template"])
def test_images_of_every_layout_are_taken_compared_and_reverted(bench: Bench, layout: str) -> None:
    name = f"t{bench.number}-odd.raw"
    options = {
        "striped": ["--stripe-unit", "65536", "--stripe-count", "4"],
        "small objects": ["--object-size", "64K"],
        "no exclusive lock": ["--image-feature", "layering"],
    }
    if layout == "child of a template":
        template = bench.volume(16 * MIB, data=b"template" * 100_000)
        rbd(bench, "snap", "create", "--no-progress", f"vms/{template}@base")
        rbd(bench, "clone", "--rbd-default-clone-format", "2", f"vms/{template}@base", f"vms/{name}")
    else:
        rbd(bench, "create", "--size", "16M", *options[layout], f"vms/{name}")
    try:
        bench.storage.write(name, 3 * MIB, b"first" * 10_000)
        old, new = bench.id(), bench.id()
        bench.take(old, name)
        then = bench.storage.digest(name)
        bench.storage.write(name, 0, b"second" * 10_000)
        bench.storage.write(name, 9 * MIB, b"third")
        bench.take(new, name)
        request = rpc.ListChangedExtentsRequest(id=new, volume=bench.ref(name), base_id=old)
        content = bytearray(bench.read(old, name))
        for response in bench.stub.ListChangedExtents(request):
            for extent in response.extents:
                content[extent.offset : extent.offset + extent.length] = bench.read(
                    new, name, extent.offset, extent.length
                )
        assert bytes(content) == bench.read(new, name)
        assert bench.revert(old).revert.state == pb.Revert.STATE_DONE
        assert bench.storage.digest(name) == then
        for group in reversed(bench.groups):
            bench.delete(group)
    finally:
        rbd(bench, "rm", "--no-progress", f"vms/{name}")
        if layout == "child of a template":
            rbd(bench, "snap", "rm", "--no-progress", f"vms/{template}@base")


def test_an_rbd_image_is_raw(bench: Bench) -> None:
    spec = bench.spec(bench.volume())
    spec.volumes[0].format = "qcow2"
    with refused("INVALID_ARGUMENT"):
        bench.stub.CreateGroupSnapshot(rpc.CreateGroupSnapshotRequest(id=bench.id(), spec=spec))
