"""QEMU's image locks, which the NFS server keeps for all its clients."""

import subprocess
import time

from frostgate.v1 import group_snapshot_pb2 as pb
from tests.conformance.bench import Bench, refused
from tests.conformance.storages import MIB, open_in_qemu
from tests.gateway_process import error_info
from tests.nfs.conftest import OverNfs


def test_a_volume_in_use_on_this_host_is_not_copied_and_its_user_is_named(bench: Bench, storage: OverNfs) -> None:
    volume = bench.volume(pool="copy")
    with open_in_qemu(storage.mounted("copy") / volume, storage.socket) as pid, refused("VOLUME_IN_USE") as caught:
        bench.prepare(bench.id(), ("copy", volume))
    assert str(pid) in error_info(caught.value).metadata["users"]
    assert storage.leftovers("copy") == []
    bench.take(bench.id(), ("copy", volume))


def test_a_volume_in_use_on_another_host_is_not_copied_also_after_the_server_was_restarted(
    bench: Bench, storage: OverNfs
) -> None:
    volume = bench.volume(pool="copy")
    with storage.in_use(volume, "copy"):
        with refused("VOLUME_IN_USE") as caught:
            bench.prepare(bench.id(), ("copy", volume))
        assert error_info(caught.value).metadata["users"] == "somebody on another host"
    with open_in_qemu(storage.mounted("copy") / volume, storage.socket):
        storage.server.restart()  # the client claims QEMU's locks again
        with refused("VOLUME_IN_USE"):
            bench.prepare(bench.id(), ("copy", volume))
    bench.take(bench.id(), ("copy", volume))


def test_nobody_can_write_a_volume_on_another_host_while_it_is_copied(bench: Bench, storage: OverNfs) -> None:
    volume, group = bench.volume(200 * MIB, pool="copy", data=b"c" * 190 * MIB), bench.id()
    before = storage.digest(volume, "copy")
    bench.prepare(group, ("copy", volume))
    bench.cut(group)
    write = ["qemu-io", "-f", "raw", "-c", "write 150M 1M", storage.root("copy") / volume]
    tried = subprocess.run(write, check=False, capture_output=True, text=True)
    assert bench.get(group).state == pb.GROUP_SNAPSHOT_STATE_COPYING, "the copy was over too soon to be of use"
    assert "lock" in tried.stderr
    assert bench.settled(group).state == pb.GROUP_SNAPSHOT_STATE_READY
    assert storage.member_digest(group, volume, "copy") == before
    deadline = time.monotonic() + 60
    while subprocess.run(write, check=False, capture_output=True).returncode:
        assert time.monotonic() < deadline, "the lock outlives the copy"


def test_two_gateways_on_one_mount_keep_out_of_each_others_way(bench: Bench, hasty: Bench, storage: OverNfs) -> None:
    volume = bench.volume()
    mine, theirs = bench.id(), hasty.id()
    before = storage.digest(volume)
    bench.prepare(mine, volume)
    hasty.take(theirs, volume)
    storage.write(volume, 0, b"between the two")
    between = storage.digest(volume)
    bench.take(mine, volume)
    assert storage.member_digest(theirs, volume) == before
    assert storage.member_digest(mine, volume) == between
    with refused("GROUP_SNAPSHOT_EXISTS"):
        bench.prepare(theirs, volume)
    hasty.delete(theirs)
    assert not storage.exists(theirs)
    assert storage.member_digest(mine, volume) == between
