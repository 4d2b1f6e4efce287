"""Bad input: every field of every call is refused by name, before anything is changed."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from frostgate.v1 import volume_pb2
from tests.conformance.conftest import Bench
from tests.gateway_process import reason_of, violations_of

UUID = "11111111-2222-3333-4444-555555555555"
BAD_NAMES = {
    "empty": "",
    "dots": "..",
    "dots inside": "a..b",
    "slash": "a/b",
    "absolute": "/etc/passwd",
    "NUL": "a\0b",
    "control": "a\x1b[2Jb",
    "newline": "a\nb",
    "long": "a" * 10_000,
    "hidden": ".hidden",
    "option": "-rf",
}
GOOD = volume_pb2.VolumeRef(pool="main", volume="good.raw")
ID = "good-id"


def spec(ref: volume_pb2.VolumeRef = GOOD, **fields: Any) -> pb.GroupSnapshotSpec:
    return pb.GroupSnapshotSpec(volumes=[pb.VolumeSpec(ref=ref)], **fields)


def cases() -> Iterator[tuple[str, str, Any, str]]:
    """(what, method, request, the field at fault)."""
    by_id = {
        "PrepareGroupSnapshot": lambda i: rpc.PrepareGroupSnapshotRequest(id=i, spec=spec()),
        "CreateGroupSnapshot": lambda i: rpc.CreateGroupSnapshotRequest(id=i, spec=spec()),
        "ConfirmGroupSnapshot": lambda i: rpc.ConfirmGroupSnapshotRequest(id=i, consistency=pb.CONSISTENCY_CRASH),
        "GetGroupSnapshot": lambda i: rpc.GetGroupSnapshotRequest(id=i),
        "WatchGroupSnapshot": lambda i: rpc.WatchGroupSnapshotRequest(id=i),
        "RevertGroupSnapshot": lambda i: rpc.RevertGroupSnapshotRequest(id=i),
        "DeleteGroupSnapshot": lambda i: rpc.DeleteGroupSnapshotRequest(id=i),
        "CloneGroupSnapshot": lambda i: rpc.CloneGroupSnapshotRequest(
            id=i, clones=[rpc.CloneSpec(source=GOOD, target_volume="t")]
        ),
        "ReadBlocks": lambda i: rpc.ReadBlocksRequest(id=i, volume=GOOD),
        "ListAllocatedExtents": lambda i: rpc.ListAllocatedExtentsRequest(id=i, volume=GOOD),
        "ListChangedExtents": lambda i: rpc.ListChangedExtentsRequest(id=i, volume=GOOD),
    }
    by_ref = {
        "GetVolume": (lambda r: rpc.GetVolumeRequest(ref=r), "ref"),
        "PrepareGroupSnapshot": (lambda r: rpc.PrepareGroupSnapshotRequest(id=ID, spec=spec(r)), "spec.volumes[0].ref"),
        "CreateGroupSnapshot": (lambda r: rpc.CreateGroupSnapshotRequest(id=ID, spec=spec(r)), "spec.volumes[0].ref"),
        "ListGroupSnapshots": (lambda r: rpc.ListGroupSnapshotsRequest(volume=r), "volume"),
        "RevertGroupSnapshot": (lambda r: rpc.RevertGroupSnapshotRequest(id=ID, volumes=[r]), "volumes[0]"),
        "CloneGroupSnapshot": (
            lambda r: rpc.CloneGroupSnapshotRequest(id=ID, clones=[rpc.CloneSpec(source=r, target_volume="t")]),
            "clones[0].source",
        ),
        "ReadBlocks": (lambda r: rpc.ReadBlocksRequest(id=ID, volume=r), "volume"),
        "ListAllocatedExtents": (lambda r: rpc.ListAllocatedExtentsRequest(id=ID, volume=r), "volume"),
        "ListChangedExtents": (lambda r: rpc.ListChangedExtentsRequest(id=ID, volume=r), "volume"),
    }
    for what, name in BAD_NAMES.items():
        for method, make in by_id.items():
            yield f"{method} id {what}", method, make(name), "id"
        for method, (make_ref, field) in by_ref.items():
            bad = volume_pb2.VolumeRef(pool="main", volume=name)
            yield f"{method} volume {what}", method, make_ref(bad), f"{field}.volume"
            if what not in ("option",):
                bad = volume_pb2.VolumeRef(pool=name, volume="v")
                yield f"{method} pool {what}", method, make_ref(bad), f"{field}.pool"
        if what not in ("option",):
            yield f"ListVolumes pool {what}", "ListVolumes", rpc.ListVolumesRequest(pool=name), "pool"
        clone = rpc.CloneSpec(source=GOOD, target_volume=name)
        request = rpc.CloneGroupSnapshotRequest(id=ID, clones=[clone])
        yield f"clone target {what}", "CloneGroupSnapshot", request, "clones[0].target_volume"
        if name:
            yield (
                f"safety {what}",
                "RevertGroupSnapshot",
                rpc.RevertGroupSnapshotRequest(id=ID, safety_id=name),
                "safety_id",
            )
            extents = rpc.ListChangedExtentsRequest(id=ID, volume=GOOD, base_id=name)
            yield f"base {what}", "ListChangedExtents", extents, "base_id"
    yield from other_cases()


def other_cases() -> Iterator[tuple[str, str, Any, str]]:
    """What is wrong in other ways than a name."""

    def create(**fields: Any) -> Any:
        return rpc.CreateGroupSnapshotRequest(id=ID, **fields)

    def taken(**fields: Any) -> Any:
        return create(spec=spec(**fields))

    yield "no volumes", "CreateGroupSnapshot", create(spec=pb.GroupSnapshotSpec()), "spec.volumes"
    many = pb.GroupSnapshotSpec(
        volumes=[pb.VolumeSpec(ref=volume_pb2.VolumeRef(pool="main", volume=f"v{n}")) for n in range(129)]
    )
    yield "129 volumes", "CreateGroupSnapshot", create(spec=many), "spec.volumes"
    twice = pb.GroupSnapshotSpec(volumes=[pb.VolumeSpec(ref=GOOD), pb.VolumeSpec(ref=GOOD)])
    yield "a volume twice", "CreateGroupSnapshot", create(spec=twice), "spec.volumes[1].ref"
    odd = pb.GroupSnapshotSpec(volumes=[pb.VolumeSpec(ref=GOOD, format="vmdk")])
    yield "an unknown format", "CreateGroupSnapshot", create(spec=odd), "spec.volumes[0].format"
    whole = {"hypervisor": "host1", "domain": UUID, "disk": "vda"}
    bad_attachments = {
        "hypervisor": ("", "a/b", "qemu+ssh://host/system", "h" * 256),
        "domain": ("", "web1", UUID.upper().replace("1", "A")),
        "disk": ("", "v" * 33, "vda'/>", "../vda"),
    }
    for key, values in bad_attachments.items():
        for value in values:
            attached = pb.VolumeSpec(ref=GOOD, attachment=pb.VolumeAttachment(**{**whole, key: value}))
            request = create(spec=pb.GroupSnapshotSpec(volumes=[attached]))
            yield f"attachment {key} {value[:9]!r}", "CreateGroupSnapshot", request, f"spec.volumes[0].attachment.{key}"
    yield "65 labels", "CreateGroupSnapshot", taken(labels={f"k{n}": "" for n in range(65)}), "spec.labels"
    yield "a vm uuid", "CreateGroupSnapshot", taken(vm=pb.VmRecord(uuid="no", name="x")), "spec.vm.uuid"
    yield "no vm name", "CreateGroupSnapshot", taken(vm=pb.VmRecord(uuid=UUID)), "spec.vm.name"
    loud = pb.VmRecord(uuid=UUID, name="a\x07b")
    yield "a vm name that rings", "CreateGroupSnapshot", taken(vm=loud), "spec.vm.name"
    long = pb.VmRecord(uuid=UUID, name="x", domain_xml="x" * (1024 * 1024 + 1))
    yield "a long domain xml", "CreateGroupSnapshot", taken(vm=long), "spec.vm.domain_xml"
    for seconds in (-1, 0, 3601):
        request = create(spec=spec())
        request.confirm_within.FromSeconds(seconds)
        yield f"confirm within {seconds}", "CreateGroupSnapshot", request, "confirm_within"
        prepare = rpc.PrepareGroupSnapshotRequest(id=ID, spec=spec())
        prepare.expire_after.FromSeconds(seconds)
        yield f"expire after {seconds}", "PrepareGroupSnapshot", prepare, "expire_after"
    yield "prepare without spec", "PrepareGroupSnapshot", rpc.PrepareGroupSnapshotRequest(id=ID), "spec"
    yield "no consistency", "ConfirmGroupSnapshot", rpc.ConfirmGroupSnapshotRequest(id=ID), "consistency"
    for size in (-1, 1001):
        yield f"page of {size}", "ListVolumes", rpc.ListVolumesRequest(pool="main", page_size=size), "page_size"
        yield f"page {size}", "ListGroupSnapshots", rpc.ListGroupSnapshotsRequest(page_size=size), "page_size"
    for token in ("garbage", "x" * 10_000, "€"):
        listing = rpc.ListVolumesRequest(pool="main", page_token=token)
        yield f"volumes token {token[:9]}", "ListVolumes", listing, "page_token"
        groups = rpc.ListGroupSnapshotsRequest(page_token=token)
        yield f"groups token {token[:9]}", "ListGroupSnapshots", groups, "page_token"
    yield "a uuid to list", "ListGroupSnapshots", rpc.ListGroupSnapshotsRequest(vm_uuid="no"), "vm_uuid"
    yield "no sources", "ResolveVolumes", rpc.ResolveVolumesRequest(), "sources"
    nothing = rpc.ResolveVolumesRequest(sources=[volume_pb2.DiskSource()])
    yield "an empty source", "ResolveVolumes", nothing, "sources[0]"
    for path in ("relative", "", "/a\0b", "/" + "x" * 5000):
        request = rpc.ResolveVolumesRequest(sources=[volume_pb2.DiskSource(file=path)])
        yield f"path {path[:9]!r}", "ResolveVolumes", request, "sources[0].file"
    yield "no clones", "CloneGroupSnapshot", rpc.CloneGroupSnapshotRequest(id=ID), "clones"


def call(bench: Bench, method: str, request: Any) -> None:
    """Call a method, to the end when it streams."""
    answer = getattr(bench.stub, method)(request, timeout=10)
    if not hasattr(answer, "DESCRIPTOR"):
        list(answer)


CASES = {what: (method, request, field) for what, method, request, field in cases()}


@pytest.mark.parametrize("what", CASES)
def test_every_malformed_field_is_refused_by_name(bench: Bench, what: str) -> None:
    method, request, field = CASES[what]
    with pytest.raises(grpc.RpcError) as caught:
        call(bench, method, request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value
    assert reason_of(caught.value) == "INVALID_ARGUMENT"
    assert any(found == field or found.startswith(field + ".") for found in violations_of(caught.value)), caught.value
    assert bench.list() == []


@pytest.mark.parametrize(
    ("method", "request_bytes", "field"),
    [
        ("GetGroupSnapshot", b"\x0a\x02\xff\xfe", "id"),
        ("CreateGroupSnapshot", b"\x0a\x02\xff\xfe", "id"),
        ("ListVolumes", b"\x0a\x02\xff\xfe", "pool"),
        ("GetVolume", b"\x0a\x0a\x0a\x04main\x12\x02\xff\xfe", "ref.volume"),
        ("DeleteGroupSnapshot", b"\x0a\x03a\x80b", "id"),
    ],
)
def test_non_utf_8_is_refused_by_name(bench: Bench, method: str, request_bytes: bytes, field: str) -> None:
    call = bench.gateway.channel.unary_unary(f"/frostgate.v1.SnapshotProvider/{method}")
    with pytest.raises(grpc.RpcError) as caught:
        call(request_bytes, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations_of(caught.value) == [field]


def test_what_is_no_message_is_refused(bench: Bench) -> None:
    call = bench.gateway.channel.unary_unary("/frostgate.v1.SnapshotProvider/GetGroupSnapshot")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff\xff", timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_message_that_is_too_large_is_refused(bench: Bench) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        bench.stub.GetGroupSnapshot(rpc.GetGroupSnapshotRequest(id="a" * (9 * 1024 * 1024)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_reflection_lists_the_service(bench: Bench) -> None:
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    database = ProtoReflectionDescriptorDatabase(bench.gateway.channel)
    assert "frostgate.v1.SnapshotProvider" in database.get_services()
    service = DescriptorPool(database).FindServiceByName("frostgate.v1.SnapshotProvider")
    assert "CreateGroupSnapshot" in service.methods_by_name
