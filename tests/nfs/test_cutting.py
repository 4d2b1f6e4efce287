"""Snapshots of volumes on an NFS 4.2 mount, looked at on the server."""

import re
import subprocess
from pathlib import Path

import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from tests.conformance.bench import Bench, refused
from tests.conformance.storages import MIB
from tests.nfs.conftest import OverNfs, wait

READY = pb.GROUP_SNAPSHOT_STATE_READY


def shared_bytes(path: Path) -> int:
    """How much of a file shares its blocks with others, by the server's file system."""
    said = subprocess.run(["filefrag", "-v", "-b1", path], check=True, capture_output=True, text=True).stdout
    return sum(int(length) for length in re.findall(r"^ *\d+: .*: +(\d+):.*\bshared\b", said, re.MULTILINE))


def test_a_cut_is_instant_where_the_server_clones(bench: Bench, storage: OverNfs) -> None:
    # the first look at a pool may take longer than the gateway waits for it
    wait(lambda: not any(bench.pool(pool).health.message for pool in ("main", "copy")), every_s=0.2)
    assert bench.capabilities("main").instant_cut
    assert not bench.capabilities("copy").instant_cut
    assert storage.leftovers("main") == storage.leftovers("copy") == []


@pytest.mark.parametrize(("pool", "mode"), [("main", "clone"), ("copy", "copy")])
def test_a_snapshot_is_taken_reverted_to_and_deleted(bench: Bench, storage: OverNfs, pool: str, mode: str) -> None:
    volumes = [bench.volume(24 * MIB, pool=pool, data=bytes([65 + n]) * 5 * MIB) for n in range(2)]
    group = bench.id()
    before = [storage.digest(volume, pool) for volume in volumes]
    taken = bench.take(group, *((pool, volume) for volume in volumes))
    assert [member.mode for member in taken.members] == [mode, mode]
    for volume, digest in zip(volumes, before, strict=True):
        assert storage.member_digest(group, volume, pool) == digest
        assert storage.member_ranges(group, volume, pool) == storage.ranges(volume, pool) == [(0, 5 * MIB)]
        member = storage.member(group, volume, pool)
        assert shared_bytes(member) == (5 * MIB if mode == "clone" else 0)
        assert member.stat().st_mode & 0o777 == 0o400
        assert bench.read(group, volume, 0, 5 * MIB, pool)[:4] == member.read_bytes()[:4]
        storage.write(volume, MIB, b"damage", pool)
    damaged = [storage.digest(volume, pool) for volume in volumes]
    assert damaged != before
    reverted = bench.revert(group)
    assert reverted.revert.state == pb.Revert.STATE_DONE
    assert [storage.digest(volume, pool) for volume in volumes] == before
    safety = reverted.revert.safety_id
    assert [storage.member_digest(safety, volume, pool) for volume in volumes] == damaged
    bench.delete(group)
    bench.delete(safety)
    assert storage.leftovers(pool) == []
    assert [storage.digest(volume, pool) for volume in volumes] == before


def test_a_volume_that_a_machine_writes_is_cloned(bench: Bench, storage: OverNfs) -> None:
    volume, group = bench.volume(), bench.id()
    before = storage.digest(volume)
    with storage.in_use(volume):
        taken = bench.take(group, volume)
        assert taken.members[0].mode == "clone"
        assert storage.member_digest(group, volume) == before
        with refused("VOLUME_IN_USE"):
            bench.revert(group)


def test_what_this_host_wrote_a_moment_ago_is_in_the_snapshot(bench: Bench, storage: OverNfs) -> None:
    volume, group = bench.volume(8 * MIB), bench.id()
    content = b"n" * (3 * MIB)
    with (storage.mounted() / volume).open("r+b") as file:  # in this client's memory, not on the server yet
        file.write(content)
        file.flush()
        bench.take(group, volume)
    assert storage.member(group, volume).read_bytes()[: len(content)] == content


@pytest.mark.expects_log("group snapshot failed")
def test_a_volume_written_on_another_host_while_it_is_copied_is_no_snapshot(bench: Bench, storage: OverNfs) -> None:
    volume, group = bench.volume(64 * MIB, pool="copy", data=b"o" * 60 * MIB), bench.id()
    before = storage.digest(volume, "copy")
    bench.prepare(group, ("copy", volume))
    bench.cut(group)
    storage.write(volume, 32 * MIB, b"by a program that knows no locks", "copy")
    outcome = bench.settled(group)
    if outcome.state == READY:
        assert storage.member_digest(group, volume, "copy") == before
    else:
        assert outcome.failure.reason == "VOLUME_CHANGED"
        assert not storage.exists(group, "copy")
