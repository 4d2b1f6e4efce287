"""Mounts against the kernel's own mount of the same image; and everything that can go wrong."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from frostgate.v1 import volume_pb2
from tests.gateway_process import FROSTGATE
from tests.lab.disk import allocated_ranges, sha256
from tests.lab.filesystems import mount_loop, unmount
from tests.lab.images import POSIX, Kind, crowd, described, make_image
from tests.mounting import MIB, Images, comparable, image_pool, kernel, mounted, over_tcp, parsers_of, taken

FILES = 1000
CROWD = 100_000
KINDS: tuple[Kind, ...] = ("ext4", "ext2", "xfs", "ntfs", "vfat")
VOLUMES = (*(f"{kind}.raw" for kind in KINDS), "packed.qcow2", "noise.raw")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    with image_pool(tmp_path_factory.mktemp("mount"), "mount-pool") as made:
        for kind in KINDS:
            make_image(kind, made.pool / f"{kind}.raw", 1024 * MIB, FILES)
        subprocess.run(
            ["qemu-img", "convert", "-O", "qcow2", "-c", made.pool / "ext4.raw", made.pool / "packed.qcow2"], check=True
        )
        (made.pool / "noise.raw").write_bytes(os.urandom(8 * MIB))
        yield made


@pytest.fixture(scope="module")
def snapshot(images: Images) -> Iterator[str]:
    with taken(images, "all", *VOLUMES) as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_mounted_files_are_what_the_kernel_sees(images: Images, snapshot: str, kind: Kind) -> None:
    posix = kind in POSIX
    with mounted(images, snapshot) as directory:
        tree = directory / "files" / f"{kind}.raw" / "whole"
        ours = described(tree, posix=posix)
        used = sum(path.lstat().st_blocks for path in tree.rglob("*") if path.is_file()) * 512
    if kind == "vfat":
        assert len(ours) > FILES
        return
    with kernel(images, kind) as mine:
        theirs = described(mine, posix=posix)
        really = sum(path.lstat().st_blocks for path in mine.rglob("*") if path.is_file()) * 512
    assert 0.8 < used / really < 1.2
    assert len(ours) > FILES
    assert ours.keys() == theirs.keys()
    ours, theirs = comparable(ours), comparable(theirs)
    assert {name: (ours.get(name), theirs[name]) for name in theirs if ours.get(name) != theirs[name]} == {}


def test_fat_files_are_what_mtools_wrote(images: Images, snapshot: str) -> None:
    out = images.scratch / "fat-oracle"
    out.mkdir()
    image = images.pool / "vfat.raw"
    subprocess.run(["mcopy", "-s", "-n", "-i", image, "::/*", out], check=True, capture_output=True)
    with mounted(images, snapshot) as directory:
        assert described(directory / "files" / "vfat.raw" / "whole", posix=False) == described(out, posix=False)


def test_disks_are_the_raw_bytes_whatever_the_format(images: Images, snapshot: str) -> None:
    with mounted(images, snapshot) as directory:
        raw, packed = directory / "disks" / "ext4.raw.raw", directory / "disks" / "packed.qcow2.raw"
        assert sha256(raw) == sha256(packed) == sha256(images.pool / "ext4.raw")
        # a raw file on this host is the kernel's own, with its holes
        told = json.loads(images.cli("snapshot", "show", snapshot, "--output", "json", check=True).stdout)
        (own,) = [one["local_path"] for one in told["members"] if one["volume"]["volume"] == "ext4.raw"]
        assert allocated_ranges(raw) == allocated_ranges(Path(own))
        assert packed.stat().st_blocks < packed.stat().st_size // 512
        # fit for a loop device
        place = images.scratch / "by-loop"
        place.mkdir()
        try:
            mount_loop(packed, place, "ext4", "ro,noload")
            assert any(place.iterdir())
        finally:
            unmount(place)
            place.rmdir()


def test_what_cannot_be_read_says_why(images: Images, snapshot: str) -> None:
    with mounted(images, snapshot) as directory:
        why = (directory / "files" / "noise.raw" / "whole" / "WHY-NOT.txt").read_text()
        assert "losetup" in why
        assert "journal" in (directory / "files" / "xfs.raw" / "whole.NOTICE.txt").read_text()
    told = images.json("ls", snapshot)
    assert {one["volume"]: one["filesystem"] for one in told}["noise.raw"] == "unknown"


def test_reads_survive_a_restart_of_the_gateway(images: Images, snapshot: str) -> None:
    with mounted(images, snapshot) as directory:
        packed = directory / "disks" / "packed.qcow2.raw"
        with packed.open("rb", buffering=0) as file:
            file.seek(600 * MIB)
            before = os.pread(file.fileno(), MIB, 0)
            images.gateway.restart()
            with (images.pool / "ext4.raw").open("rb") as original:
                assert before == original.read(MIB)
                original.seek(900 * MIB)
                assert os.pread(file.fileno(), MIB, 900 * MIB) == original.read(MIB)


def test_sigterm_unmounts_and_kill_9_leaves_what_umount_takes_away(images: Images, snapshot: str) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        directory = images.scratch / f"ended-{number}"
        told = json.loads(images.cli("mount", snapshot, directory, "--output", "json", check=True).stdout)
        assert images.cli("mount", snapshot, directory).returncode == 4
        process = psutil.Process(told["pid"])
        list((directory / "files" / "ext4.raw" / "whole").iterdir())
        parsers = process.children()
        assert parsers
        process.send_signal(number)
        process.wait(60)
        assert not psutil.wait_procs(parsers, timeout=60)[1]
        if number == signal.SIGKILL:
            images.cli("umount", directory, check=True)
        assert str(directory) not in Path("/proc/self/mounts").read_text()
        assert images.cli("umount", directory).returncode == 3


def test_bad_words_change_nothing(images: Images, snapshot: str) -> None:
    full = images.scratch / "full"
    full.mkdir()
    (full / "x").touch()
    assert images.cli("mount", snapshot, full).returncode == 4
    assert images.cli("mount", "nope", images.scratch / "empty").returncode == 3
    assert images.cli("umount").returncode == 2
    assert str(images.scratch / "empty") not in Path("/proc/self/mounts").read_text()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_directory_of_100_000_entries_is_what_the_kernel_sees(images: Images, kind: Kind) -> None:
    image = images.pool / f"crowd-{kind}.raw"
    crowd(kind, image, CROWD)
    with kernel(images, kind, image) as mine:
        theirs = set(os.listdir(mine / "crowd"))
    with taken(images, "crowd", image.name), mounted(images, "crowd") as directory:
        shown = directory / "files" / image.name / "whole" / "crowd"
        listed = os.listdir(shown)
        assert len(listed) == CROWD
        assert set(listed) == theirs
        assert (shown / listed[-1]).stat().st_size == 0
        for name in listed[:: CROWD // 100]:  # of most of them, the mount has forgotten what it told the kernel
            assert (shown / name).read_bytes() == b""
        with pytest.raises(FileNotFoundError):
            (shown / "nobody").stat()
    image.unlink()


def test_all_shows_snapshots_as_they_come_and_go(images: Images, snapshot: str) -> None:
    with mounted(images, "--all") as directory:
        shown = directory / "no-vm"
        assert snapshot in os.listdir(shown)
        with taken(images, "later", "noise.raw"):
            wait_until(lambda: "later" in os.listdir(shown))
            assert sha256(shown / "later" / "disks" / "noise.raw.raw") == sha256(images.pool / "noise.raw")
        wait_until(lambda: "later" not in os.listdir(shown))


def test_all_shows_the_snapshot_that_has_an_id_now(images: Images, snapshot: str) -> None:
    with mounted(images, "--all") as directory:
        shown = directory / "no-vm" / "again" / "disks"
        for volume in ("noise.raw", "packed.qcow2", "noise.raw"):
            with taken(images, "again", volume):
                wait_until(lambda name=f"{volume}.raw": shown.is_dir() and os.listdir(shown) == [name])
                with (shown / f"{volume}.raw").open("rb") as file:
                    first = "noise.raw" if volume == "noise.raw" else "ext4.raw"
                    with (images.pool / first).open("rb") as original:
                        assert file.read(MIB) == original.read(MIB)


def test_all_waits_for_a_gateway_that_is_started_again(images: Images, snapshot: str) -> None:
    with mounted(images, "--all") as directory:
        images.gateway.stop()
        began = subprocess.Popen(
            ["sha256sum", directory / "no-vm" / snapshot / "disks" / "noise.raw.raw"], stdout=subprocess.PIPE, text=True
        )
        try:
            time.sleep(1)
            assert began.poll() is None
        finally:
            images.gateway.start()
        told, _ = began.communicate(timeout=100)
        assert told.split()[0] == sha256(images.pool / "noise.raw")


@pytest.mark.parametrize("way", ["nbd", "tcp"])
def test_a_mount_never_shows_bytes_of_another_snapshot_with_its_id(images: Images, way: str) -> None:
    first, second = os.urandom(32 * MIB), os.urandom(32 * MIB)
    member = images.pool / "changing.qcow2"

    def write(content: bytes) -> None:
        plain = images.scratch / "plain"
        plain.write_bytes(content)
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", plain, member], check=True)

    write(first)
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(over_tcp(images)) if way == "tcp" else images.gateway.address
        stack.enter_context(taken(images, "changing", member.name))
        directory = stack.enter_context(mounted(images, "changing", "--address", address))
        with (directory / "disks" / "changing.qcow2.raw").open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), MIB, 0) == first[:MIB]
            images.cli("snapshot", "delete", "changing", "--yes", check=True)
            write(second)
            images.cli("snapshot", "create", "changing", f"p/{member.name}", check=True)
            errors = set()
            for offset in range(0, 32 * MIB, 4096 * 37):
                try:
                    assert os.pread(file.fileno(), 4096, offset) == first[offset : offset + 4096]
                except OSError as error:
                    errors.add(error.errno)
            # a stream that was under way goes on to its end
            assert errors == {errno.ESTALE} or (way == "tcp" and not errors)
    member.unlink()


def test_very_many_disks_take_few_processes(images: Images) -> None:
    many = [f"many-{number}.raw" for number in range(40)]
    for name in many:
        subprocess.run(["cp", "--reflink=always", images.pool / "ext2.raw", images.pool / name], check=True)
    with taken(images, "many", *many), mounted(images, "many") as directory:
        for _ in range(2):
            for name in many:
                assert os.listdir(directory / "files" / name / "whole")
            assert len(parsers_of(directory)) <= 32
    for name in many:
        (images.pool / name).unlink()


def test_nobody_needs_to_be_root(images: Images, snapshot: str) -> None:
    user = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]
    where = Path(tempfile.mkdtemp(prefix="frostgate-user-"))
    shutil.chown(where, "nobody", "nogroup")
    with over_tcp(images) as address:
        words = [FROSTGATE, "mount", snapshot, where / "m", "--address", address, "--output", "json"]
        environment = {**images.gateway.environment, "HOME": str(where), "TMPDIR": str(where)}
        told = subprocess.run([*user, *words], env=environment, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
        serving = psutil.Process(json.loads(told.stdout)["pid"])
        try:
            command = [*user, "sha256sum", where / "m" / "disks" / "noise.raw.raw"]
            seen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert seen.split()[0] == sha256(images.pool / "noise.raw")
        finally:
            subprocess.run([*user, FROSTGATE, "umount", where / "m"], env=environment, check=True)
            serving.wait(60)
    assert [path.name for path in where.iterdir()] == ["m"]  # no log: there was nothing to say


def test_a_mount_is_found_again_by_any_of_its_names(images: Images, snapshot: str) -> None:
    real, link = images.scratch / "real", images.scratch / "link"
    real.mkdir()
    link.symlink_to(real)
    for mounting, unmounting in ((link / "x", real / "x"), (real / ".." / "real" / "x", link / "x")):
        images.cli("mount", snapshot, mounting, check=True)
        images.cli("umount", unmounting, check=True)
    assert str(real) not in Path("/proc/self/mounts").read_text()


def test_a_mount_that_fails_leaves_no_directory(images: Images) -> None:
    for words in (["--foreground"], []):
        assert images.cli("mount", "nosuch", images.scratch / "unmade", *words).returncode == 3
        assert not (images.scratch / "unmade").exists()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_is_not_ready_is_refused(images: Images) -> None:
    request = rpc.PrepareGroupSnapshotRequest(
        id="planned",
        spec=pb.GroupSnapshotSpec(volumes=[pb.VolumeSpec(ref=volume_pb2.VolumeRef(pool="p", volume="noise.raw"))]),
    )
    images.gateway.stub.PrepareGroupSnapshot(request, timeout=60)
    refused = images.cli("mount", "planned", images.scratch / "planned")
    assert refused.returncode == 4
    assert "planned is PREPARED; only a READY one can be read" in refused.stderr
    assert images.cli("ls", "planned").returncode == 4
    assert images.cli("restore", "planned:noise.raw/whole/x", images.scratch / "x").returncode == 4
    images.cli("snapshot", "delete", "planned", "--yes", check=True)


def test_a_gateway_that_stays_away_is_an_error_with_a_log_line_and_not_the_end(images: Images, snapshot: str) -> None:
    directory = images.scratch / "away"
    told = images.json("mount", snapshot, directory)
    serving = psutil.Process(told["pid"])
    try:
        with (directory / "disks" / "packed.qcow2.raw").open("rb", buffering=0) as file:
            images.gateway.stop()
            try:
                with pytest.raises(OSError) as failed:
                    os.pread(file.fileno(), 4096, 500 * MIB)
            finally:
                images.gateway.start()
            assert failed.value.errno == errno.EIO
            assert "read_failed" in Path(told["log"]).read_text()
            with (images.pool / "ext4.raw").open("rb") as original:
                assert os.pread(file.fileno(), MIB, 500 * MIB) == os.pread(original.fileno(), MIB, 500 * MIB)
    finally:
        images.cli("umount", "--lazy", directory, check=True)
        serving.wait(120)  # it has the members open until then


def test_umount_leaves_who_is_in_there_in_peace(images: Images, snapshot: str) -> None:
    directories = [images.scratch / name for name in ("one", "two with a space")]
    serving = [psutil.Process(images.json("mount", snapshot, directory)["pid"]) for directory in directories]
    assert images.cli("umount", directories[0], "--all").returncode == 2
    with (directories[0] / "files" / "noise.raw" / "whole" / "WHY-NOT.txt").open():
        busy = images.cli("umount", directories[0])
        assert busy.returncode == 4
        assert "--lazy" in busy.stderr
    told = images.json("umount", directories[0])
    assert told == {"unmounted": [str(directories[0])]}
    images.cli("umount", directories[1], check=True)
    for process in serving:
        process.wait(120)
