"""Reading members: bytes, ranges and extents, against qemu-img and the kernel."""

import contextlib
import hashlib
import subprocess
from pathlib import Path

import grpc
import pytest

from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.conftest import FILES, Bench, refused
from tests.conformance.storages import MIB
from tests.gateway_process import violations_of
from tests.lab.disk import convert


def test_a_member_reads_as_the_volume_was(bench: Bench) -> None:
    volume, group = bench.volume(16 * MIB), bench.id()
    bench.storage.write(volume, 5 * MIB, b"far out" * 1000)
    before = bench.storage.digest(volume)
    bench.take(group, volume)
    bench.storage.write(volume, 0, b"later")
    assert hashlib.sha256(bench.read(group, volume)).hexdigest() == before


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (1, 4096), (MIB - 1, 2), (4 * MIB - 3, 3), (4 * MIB, 0), (7, 0)]
)
def test_ranges_are_exact(bench: Bench, offset: int, length: int) -> None:
    content = bytes(range(256)) * (4 * MIB // 256)
    volume, group = bench.volume(data=content), bench.id()
    bench.take(group, volume)
    end = offset + length if length else len(content)
    assert bench.read(group, volume, offset, length) == content[offset:end]


@pytest.mark.parametrize(("offset", "length", "field"), [(4 * MIB + 1, 0, "offset"), (4 * MIB - 1, 2, "length")])
def test_ranges_beyond_the_end_are_refused(bench: Bench, offset: int, length: int, field: str) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    with refused("INVALID_ARGUMENT") as caught:
        bench.read(group, volume, offset, length)
    assert violations_of(caught.value) == [field]


def test_what_is_read_is_of_the_snapshot_that_is_meant(bench: Bench) -> None:
    volume, group = bench.volume(4 * MIB), bench.id()
    bench.storage.write(volume, 0, b"1" * MIB)
    first = bench.take(group, volume)
    request = rpc.ReadBlocksRequest(id=group, volume=bench.ref(volume), length=MIB, cut_time=first.cut_time)
    assert b"".join(part.data for part in bench.stub.ReadBlocks(request)) == b"1" * MIB
    bench.delete(group)
    bench.storage.write(volume, 0, b"2" * MIB)
    second = bench.take(group, volume)
    with refused("GROUP_SNAPSHOT_NOT_FOUND"):
        list(bench.stub.ReadBlocks(request))
    request.cut_time.CopyFrom(second.cut_time)
    assert b"".join(part.data for part in bench.stub.ReadBlocks(request)) == b"2" * MIB


def test_a_reader_lent_while_its_snapshot_is_deleted_reads_for_nobody_else(bench: Bench) -> None:
    volume, group = bench.volume(16 * MIB), bench.id()
    bench.storage.write(volume, 0, b"1" * 16 * MIB)
    bench.take(group, volume)
    stream = bench.stub.ReadBlocks(rpc.ReadBlocksRequest(id=group, volume=bench.ref(volume)))
    assert next(stream).data[:1] == b"1"
    bench.delete(group)
    bench.storage.write(volume, 0, b"2" * 16 * MIB)
    bench.take(group, volume)
    with contextlib.suppress(grpc.RpcError):  # it ends well or not; its reader is not used again
        for part in stream:
            assert set(part.data) <= {ord("1")}
    assert bench.read(group, volume) == b"2" * 16 * MIB


def test_zeros_come_as_lengths(bench: Bench) -> None:
    volume, group = bench.volume(512 * MIB), bench.id()
    bench.take(group, volume)
    request = rpc.ReadBlocksRequest(id=group, volume=bench.ref(volume))
    parts = list(bench.stub.ReadBlocks(request))
    assert sum(len(part.data) for part in parts) < MIB
    assert sum(len(part.data) + part.zero_bytes for part in parts) == 512 * MIB


def test_extents_are_what_is_not_a_hole(bench: Bench) -> None:
    volume, group = bench.volume(64 * MIB), bench.id()
    for offset in (8, 24, 40):
        bench.storage.write(volume, offset * MIB, b"e" * MIB)
    bench.take(group, volume)
    request = rpc.ListAllocatedExtentsRequest(id=group, volume=bench.ref(volume))
    responses = bench.stub.ListAllocatedExtents(request)
    extents = [(extent.offset, extent.length) for response in responses for extent in response.extents]
    assert extents == bench.storage.member_ranges(group, volume)


@FILES
def test_a_qcow2_member_reads_as_the_guest_saw_it(bench: Bench, tmp_path: Path) -> None:
    volume, group = bench.volume(64 * MIB, image_format="qcow2"), bench.id()
    path = bench.storage.source(volume)["file"]
    for command in ("write -P 65 3M 2M", "write -P 66 40M 64k"):
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, path], check=True, stdout=subprocess.DEVNULL)
    convert(Path(path), "qcow2", tmp_path / "oracle.raw", "raw")
    assert bench.take(group, volume).members[0].size_bytes == 64 * MIB
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 67 0 1M", path], check=True, stdout=subprocess.DEVNULL)
    assert bench.read(group, volume) == (tmp_path / "oracle.raw").read_bytes()
    responses = bench.stub.ListAllocatedExtents(rpc.ListAllocatedExtentsRequest(id=group, volume=bench.ref(volume)))
    extents = [(extent.offset, extent.length) for response in responses for extent in response.extents]
    assert extents == [(3 * MIB, 2 * MIB), (40 * MIB, 65536)]


def test_a_raw_disk_that_looks_like_qcow2_is_read_as_raw(bench: Bench, tmp_path: Path) -> None:
    """The guest writes its disk: a qcow2 header in it must not make anybody follow it."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "trap", "1G"], check=True)
    trap = (tmp_path / "trap").read_bytes()
    volume, group = bench.volume(data=trap), bench.id()
    bench.take(group, volume)
    assert bench.get(group).members[0].size_bytes == 4 * MIB
    assert bench.read(group, volume, 0, len(trap)) == trap


def test_a_file_that_should_be_qcow2_and_is_not_is_refused(bench: Bench) -> None:
    volume = bench.volume()
    spec = bench.spec(volume)
    spec.volumes[0].format = "qcow2"
    with refused("INVALID_ARGUMENT"):
        bench.stub.CreateGroupSnapshot(rpc.CreateGroupSnapshotRequest(id=bench.id(), spec=spec))


def test_only_members_of_ready_snapshots_are_read(bench: Bench) -> None:
    volume, other, group = bench.volume(), bench.volume(), bench.id()
    bench.prepare(group, volume)
    with refused("STATE_INVALID"):
        bench.read(group, volume)
    bench.cut(group)
    bench.settled(group)
    with refused("MEMBER_NOT_FOUND"):
        bench.read(group, other)


@FILES
def test_a_reader_that_goes_away_leaves_nothing_behind(bench: Bench) -> None:
    volume, group = bench.volume(64 * MIB, image_format="qcow2"), bench.id()
    bench.take(group, volume)
    for _ in range(20):
        stream = bench.stub.ReadBlocks(rpc.ReadBlocksRequest(id=group, volume=bench.ref(volume)))
        next(stream)
        stream.cancel()
    assert bench.read(group, volume, 0, 1) == b"\0"
    bench.delete(group)
    listed = subprocess.run(["pgrep", "-P", str(bench.gateway.pid), "-c", "qemu-nbd"], capture_output=True, check=False)
    assert int(listed.stdout) == 0
