"""The server goes away, comes back, or comes back as another: a snapshot is whole or it is not there."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.bench import Bench, refused
from tests.conformance.storages import MIB
from tests.gateway_process import reason_of
from tests.nfs.conftest import OverNfs, wait

READY = pb.GROUP_SNAPSHOT_STATE_READY
MANY = 40


@contextmanager
def stopped_in_mid_cut(bench: Bench, storage: OverNfs, group: str, volumes: list[str]) -> Iterator[Callable[[], None]]:
    """The server stops when it has cloned the first of many volumes; yields what raises the cut's error."""
    members = [storage.member(group, volume) for volume in volumes]
    with ThreadPoolExecutor(1) as caller:
        cut = caller.submit(bench.cut, group)
        wait(lambda: any(member.stat().st_size for member in members))
        storage.server.stop()
        try:
            whole = sum(1 for member in members if member.stat().st_size)
            assert whole < len(members), "the cut was over before the server stopped"
            yield cut.result
        finally:
            storage.server.start()
            cut.exception()


def test_a_server_restarted_in_mid_cut_only_delays_it(bench: Bench, storage: OverNfs) -> None:
    volumes, group = [bench.volume(MIB) for _ in range(MANY)], bench.id()
    before = [storage.digest(volume) for volume in volumes]
    bench.prepare(group, *volumes)
    with stopped_in_mid_cut(bench, storage, group, volumes) as result:
        restarting = threading.Timer(0.5, storage.server.start)
        restarting.start()
        result()
        restarting.join()
    assert bench.settled(group).state == READY
    assert [storage.member_digest(group, volume) for volume in volumes] == before


@pytest.mark.expects_log("undone")
def test_a_server_that_stays_away_in_mid_cut_ends_it_at_its_deadline_with_nothing_left(
    hasty: Bench, storage: OverNfs
) -> None:
    volumes, group = [hasty.volume(MIB) for _ in range(MANY)], hasty.id()
    before = [storage.digest(volume) for volume in volumes]
    hasty.prepare(group, *volumes)
    with stopped_in_mid_cut(hasty, storage, group, volumes) as result, pytest.raises(grpc.RpcError) as caught:
        result()
    assert reason_of(caught.value) == "POOL_TIMEOUT"
    hasty.wait_gone(group)
    wait(lambda: storage.leftovers() == [])
    assert [storage.digest(volume) for volume in volumes] == before
    again = hasty.id("again")
    hasty.take(again, *volumes)
    assert [storage.member_digest(again, volume) for volume in volumes] == before


@pytest.mark.expects_log("undone")
def test_a_directory_that_was_replaced_on_the_server_is_said_to_be_stale_until_it_is_mounted_again(
    bench: Bench, storage: OverNfs
) -> None:
    volume, group = bench.volume(pool="replaced"), bench.id()
    before = storage.digest(volume, "replaced")
    bench.prepare(group, ("replaced", volume))
    export = next(export for export in storage.server.exports if export.name == "replaced")
    storage.server.replace(export)
    with refused("POOL_UNAVAILABLE") as caught:
        bench.stub.ListVolumes(rpc.ListVolumesRequest(pool="replaced"))
    assert "mount it again" in caught.value.details()
    storage.server.remount(export)
    with pytest.raises(grpc.RpcError) as caught:
        bench.cut(group)
    assert reason_of(caught.value) in ("POOL_UNAVAILABLE", "VOLUME_CHANGED")
    bench.wait_gone(group)
    again = bench.id("again")
    bench.take(again, ("replaced", volume))
    assert storage.member_digest(again, volume, "replaced") == before


def copying(bench: Bench, storage: OverNfs) -> tuple[str, str]:
    """A group and volume whose copy is under way on the server."""
    volume, group = bench.volume(200 * MIB, pool="copy", data=b"c" * 190 * MIB), bench.id()
    bench.prepare(group, ("copy", volume))
    bench.cut(group)
    member = storage.member(group, volume, "copy")
    wait(lambda: member.stat().st_blocks > 0)
    return group, volume


# The last test: Debian 12's nfsd oopses when it is stopped in mid-copy, and keeps that file system busy.
def test_a_server_restarted_in_mid_copy_only_delays_it(bench: Bench, storage: OverNfs) -> None:
    group, volume = copying(bench, storage)
    with storage.server.away():
        assert bench.get(group).state == pb.GROUP_SNAPSHOT_STATE_COPYING
    assert bench.settled(group).state == READY
    assert storage.member_digest(group, volume, "copy") == storage.digest(volume, "copy")
