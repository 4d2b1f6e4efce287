"""Backup mode: a running guest on a file system that cannot clone, cut by its hypervisor; whole, then what changed."""

import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import libvirt
import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from frostgate.v1 import volume_pb2
from tests.backup_cloud import BALLAST, MAX_INCREMENTALS, MIB, SLOW, BackupCloud, backup_cloud
from tests.gateway_process import error_info, reason_of
from tests.waiting import wait


@pytest.fixture(scope="module")
def backed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackupCloud]:
    with backup_cloud(tmp_path_factory.mktemp("backup")) as cloud:
        yield cloud


def prepare(backed: BackupCloud, group: str, spec: pb.GroupSnapshotSpec) -> None:
    backed.gateway.stub.PrepareGroupSnapshot(rpc.PrepareGroupSnapshotRequest(id=group, spec=spec))


def publish(backed: BackupCloud, word: str) -> None:
    """Write a file of 4 MiB in the guest, to its disk."""
    script = f"yes {word} | head -c {4 * MIB} > /mnt/vdb/news && sync"
    assert backed.machine.exec(["/bin/sh", "-c", script], timeout_s=120) == (0, "")


def news(word: str) -> bytes:
    """What publish() writes."""
    return (f"{word}\n" * MIB).encode()[: 4 * MIB]


def published(backed: BackupCloud) -> str:
    """SHA-256 of what the guest reads of publish()'s file."""
    return backed.machine.exec(["/bin/sh", "-c", "sha256sum < /mnt/vdb/news"], timeout_s=120)[1].split()[0]


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def read(backed: BackupCloud, group: str, target: str) -> str:
    """SHA-256 of a member as the gateway reads it."""
    pool, volume = backed.volumes[target]
    request = rpc.ReadBlocksRequest(id=group, volume=volume_pb2.VolumeRef(pool=pool, volume=volume))
    digest = hashlib.sha256()
    for part in backed.gateway.stub.ReadBlocks(request, timeout=120):
        digest.update(part.data or bytes(part.zero_bytes))
    return digest.hexdigest()


def by_qemu(backed: BackupCloud, group: str, target: str, scratch: Path) -> str:
    flat = scratch / "flat.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", backed.chain(group, target), flat], check=True)
    with flat.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    flat.unlink()
    return digest


def test_all_disks_are_cut_at_one_instant_and_copied_while_the_guest_writes(backed: BackupCloud) -> None:
    with backed.slowly():
        taken = backed.take("one", slow=True)
        assert {member.mode for member in taken.snapshot.members} == {"backup"}
        assert taken.snapshot.consistency == pb.CONSISTENCY_FILESYSTEM
        seen = []
        for snapshot in backed.watch("one"):
            seen.append(snapshot)
            if snapshot.progress.done_bytes:
                break
        assert seen[-1].state == pb.GROUP_SNAPSHOT_STATE_COPYING
        assert 0 < seen[-1].progress.done_bytes <= seen[-1].progress.total_bytes
        during = backed.machine.wait_tick(beyond=backed.machine.wait_tick().number)
    assert backed.settled("one").state == pb.GROUP_SNAPSHOT_STATE_READY
    counters = backed.counters("one")
    assert len(set(counters)) == 1
    assert counters[0] < during.number
    for target in backed.volumes:
        assert BALLAST <= allocated(backed.image("one", target)) < BALLAST * 1.5  # holes stay holes


def test_a_second_snapshot_has_only_what_changed_and_is_bit_for_bit_the_disk(
    backed: BackupCloud, tmp_path: Path
) -> None:
    publish(backed, "news")
    backed.domain.suspend()
    backed.ready("two")
    for target in ("vdb", "vdc"):
        assert len(backed.below("two", target)) == 1
        assert allocated(backed.image("two", target)) < BALLAST / 3
    assert not backed.below("two", "vda")  # raw: no bitmaps
    assert read(backed, "two", "vdb") == by_qemu(backed, "two", "vdb", tmp_path)
    backed.machine.destroy()  # as it was when it was cut
    assert all(backed.same("two", target) for target in backed.volumes)
    backed.domain.create()
    backed.machine.wait_agent()
    assert backed.file("two", "vdb", "news") == news("news")


def test_a_chain_is_bounded_and_a_deletion_in_it_breaks_nothing(backed: BackupCloud, tmp_path: Path) -> None:
    publish(backed, "olds")
    backed.ready("three")
    assert len(backed.below("three", "vdb")) == MAX_INCREMENTALS
    before = by_qemu(backed, "three", "vdb", tmp_path)
    backed.delete("two")
    assert by_qemu(backed, "three", "vdb", tmp_path) == read(backed, "three", "vdb") == before
    backed.delete("one")
    assert by_qemu(backed, "three", "vdb", tmp_path) == read(backed, "three", "vdb") == before
    backed.ready("four")
    assert not backed.below("four", "vdb")
    assert backed.file("four", "vdb", "news") == news("olds")
    names = [checkpoint.getName() for checkpoint in backed.domain.listAllCheckpoints()]
    assert len(names) == 1  # the older ones were superseded


def test_a_revert_to_an_incremental_snapshot_and_a_whole_one_after_it(backed: BackupCloud) -> None:
    publish(backed, "gone")
    backed.machine.destroy()
    done = backed.vm("revert", "backed", "three", "--yes", "--safety-id", "safety")
    assert done.returncode == 0, done.stderr
    assert all(backed.same("three", target) for target in backed.volumes)
    subprocess.run(["qemu-img", "snapshot", "-c", "inside", backed.pools["other"] / "c.qcow2"], check=True)
    backed.domain.create()
    backed.machine.wait_agent()
    assert published(backed) == hashlib.sha256(news("olds")).hexdigest()
    backed.ready("five", exclude=("vdc",))
    assert not backed.below("five", "vdb")  # the bitmap was in the file that the revert replaced
    assert backed.file("five", "vdb", "news") == news("olds")
    backed.delete("three", "four", "five", "safety")
    assert backed.is_clean()


def test_a_volume_with_internal_snapshots_is_refused_while_its_vm_runs(backed: BackupCloud) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        prepare(backed, "inside", backed.spec("vdc"))
    assert reason_of(refused.value) == "CAPABILITY_MISSING"
    assert "1 internal snapshot" in str(refused.value.details())
    assert not backed.image("inside", "vdc").parent.exists()


def test_a_checkpoint_lost_since_prepare_makes_the_same_cut_copy_everything(backed: BackupCloud) -> None:
    publish(backed, "lost")
    backed.ready("before", exclude=("vda", "vdc"))
    prepare(backed, "lost", backed.spec("vdb"))
    (name,) = (name for name in checkpoints(backed) if name.startswith("frostgate.before."))
    backed.domain.checkpointLookupByName(name).delete(0)
    cut = backed.gateway.stub.CreateGroupSnapshot(rpc.CreateGroupSnapshotRequest(id="lost"), timeout=60)
    assert cut.group_snapshot.HasField("cut_time")
    assert backed.settled("lost").state == pb.GROUP_SNAPSHOT_STATE_READY
    assert not backed.below("lost", "vdb")
    assert allocated(backed.image("lost", "vdb")) >= BALLAST
    assert backed.file("lost", "vdb", "news") == news("lost")
    backed.delete("before", "lost")


def test_without_a_freeze_the_disks_of_one_pool_still_share_an_instant(backed: BackupCloud) -> None:
    backed.ready("unfrozen", quiesce="none", exclude=("vdc",))
    a, b = (int(backed.file("unfrozen", target, "counter")) for target in ("vda", "vdb"))
    assert a - b in (0, 1)  # the writer goes from disk to disk
    backed.delete("unfrozen")


def test_a_vm_with_another_job_is_refused_before_it_is_frozen(backed: BackupCloud, tmp_path: Path) -> None:
    target = backed.pools["main"].parent / "theirs"
    disk = f"<disk name='{SLOW}' type='file'><target file='{target}'/></disk>"
    with backed.slowly():
        backed.domain.backupBegin(f"<domainbackup><disks>{disk}</disks></domainbackup>", None, 0)
        refused = backed.vm("snapshot", "backed", "--id", "busy", "--exclude", SLOW)
        assert refused.returncode == 4, refused.stderr
        assert "another job" in refused.stderr
        with pytest.raises(grpc.RpcError) as error:
            backed.gateway.stub.PrepareGroupSnapshot(
                rpc.PrepareGroupSnapshotRequest(id="busy", spec=backed.spec("vda"))
            )
        assert (error.value.code(), reason_of(error.value)) == (grpc.StatusCode.FAILED_PRECONDITION, "VM_BUSY")
        assert backed.has_job()  # theirs goes on
        backed.domain.abortJob()
    assert backed.machine.fsfreeze_status() == "thawed"
    assert not backed.image("busy", "vda").parent.exists()


@pytest.mark.parametrize(
    ("target", "said", "word"),
    [
        ("vdb", {"disk": "vda"}, "is not disk vda"),
        ("vdb", {"disk": "vdz"}, "no disk vdz"),
        ("vdb", {"domain": "11111111-2222-3333-4444-555555555555"}, "has no VM"),
        ("vdb", {"hypervisor": "elsewhere"}, "'elsewhere' to `hypervisors`"),
    ],
)
def test_an_attachment_that_is_not_true_is_refused(
    backed: BackupCloud, target: str, said: dict[str, str], word: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        prepare(backed, "untrue", backed.spec(target, **said))
    assert reason_of(refused.value) == "VOLUME_IN_USE"
    assert word in str(refused.value.details())
    assert error_info(refused.value).metadata["volume"] == "b.qcow2"
    assert not backed.image("untrue", target).parent.exists()


@contextmanager
def copying(backed: BackupCloud, group: str) -> Iterator[None]:
    """A snapshot that is cut, and hardly gets on with its copy."""
    with backed.slowly():
        backed.take(group, slow=True, exclude=("vda", "vdc"))
        assert backed.has_job()
        yield


def assert_failed(backed: BackupCloud, group: str, reason: str) -> None:
    """It is FAILED for that reason, and nothing of it is left but the record of that."""
    failed = backed.settled(group)
    assert (failed.state, failed.failure.reason) == (pb.GROUP_SNAPSHOT_STATE_FAILED, reason), failed
    assert not backed.image(group, "vdb").parent.exists()
    assert not any(name.startswith(f"frostgate.{group}.") for name in checkpoints(backed))
    backed.delete(group)


def checkpoints(backed: BackupCloud) -> list[str]:
    return [checkpoint.getName() for checkpoint in backed.domain.listAllCheckpoints()]


def test_a_job_that_is_aborted_fails_the_snapshot_and_the_next_one_is_still_incremental(backed: BackupCloud) -> None:
    backed.ready("base", exclude=("vdc",))
    publish(backed, "base")
    with copying(backed, "aborted"):
        backed.domain.abortJob()
    assert_failed(backed, "aborted", "COPY_FAILED")
    backed.ready("after", exclude=("vdc",))
    assert len(backed.below("after", "vdb")) == len(backed.below("base", "vdb")) + 1
    assert backed.file("after", "vdb", "news") == news("base")
    backed.delete("base", "after")


def test_a_deletion_in_mid_copy_ends_the_job(backed: BackupCloud) -> None:
    with copying(backed, "unwanted"):
        backed.delete("unwanted")
        assert not backed.has_job()
    assert not backed.image("unwanted", "vdb").parent.exists()
    assert not any(name.startswith("frostgate.unwanted.") for name in checkpoints(backed))


def test_a_pool_that_runs_full_in_mid_copy_fails_the_snapshot(backed: BackupCloud) -> None:
    with copying(backed, "full"):
        filler = backed.pools["main"].parent / "filler"
        free = shutil.disk_usage(filler.parent).free
        subprocess.run(["fallocate", "--length", str(free - 8 * MIB), filler], check=True)
    try:
        assert_failed(backed, "full", "POOL_FULL")
    finally:
        filler.unlink()
    if backed.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        backed.domain.resume()  # QEMU stops a guest whose disk cannot grow


def test_a_gateway_killed_in_mid_copy_goes_on_with_it(backed: BackupCloud) -> None:
    publish(backed, "kept")
    with copying(backed, "went-on"):
        backed.gateway.kill()
        backed.gateway.start()
        assert backed.has_job()
    assert backed.settled("went-on").state == pb.GROUP_SNAPSHOT_STATE_READY
    assert backed.file("went-on", "vdb", "news") == news("kept")
    backed.delete("went-on")


def test_a_copy_whose_end_no_gateway_saw_is_not_believed(backed: BackupCloud) -> None:
    with copying(backed, "unseen"):
        backed.gateway.kill()
    wait(lambda: not backed.has_job(), timeout_s=120, every_s=0.1)
    backed.gateway.start()
    assert_failed(backed, "unseen", "COPY_FAILED")


def test_libvirtd_may_be_restarted_in_mid_copy(backed: BackupCloud) -> None:
    with copying(backed, "restarted"):
        backed.hypervisor.restart_daemon()
        assert backed.has_job()
    assert backed.settled("restarted").state == pb.GROUP_SNAPSHOT_STATE_READY
    backed.delete("restarted")


def test_a_libvirtd_that_hangs_in_mid_copy_is_waited_for(backed: BackupCloud) -> None:
    with copying(backed, "hung"):
        spec, daemon = backed.spec("vdb"), backed.hypervisor.daemon_pid
        assert daemon
        os.kill(daemon, signal.SIGSTOP)
        try:
            assert backed.gateway.cli("pools").returncode == 0
            with pytest.raises(grpc.RpcError) as refused:
                prepare(backed, "meanwhile", spec)
            assert reason_of(refused.value) in ("POOL_UNAVAILABLE", "POOL_TIMEOUT")
        finally:
            os.kill(daemon, signal.SIGCONT)
    assert backed.settled("hung").state == pb.GROUP_SNAPSHOT_STATE_READY
    backed.delete("hung", "meanwhile")


def test_a_vm_that_stops_in_mid_copy_fails_the_snapshot(backed: BackupCloud) -> None:
    with copying(backed, "stopped"):
        backed.machine.destroy()
    assert_failed(backed, "stopped", "COPY_FAILED")
    assert backed.is_clean()
