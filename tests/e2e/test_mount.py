"""Mounted and restored files against the kernel's own mount of the same image; and everything that can go wrong."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.gateway_process import FROSTGATE, GatewayProcess
from tests.lab import state
from tests.lab.disk import allocated_ranges, sha256
from tests.lab.filesystems import mount_filesystem, unmount
from tests.lab.images import POSIX, Kind, described, make_image, mount_image

MIB = 1 << 20
FILES = 5000
KINDS: tuple[Kind, ...] = ("ext4", "ext2", "xfs", "ntfs", "vfat")


@dataclass(frozen=True)
class Images:
    gateway: GatewayProcess
    pool: Path
    scratch: Path

    def cli(self, *words: str | Path, **keywords):  # type: ignore[no-untyped-def]
        return self.gateway.cli(*words, **keywords)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    lab = state.prepare()
    with (
        mount_filesystem("xfs", lab / "mount-pool", 8192 * MIB) as filesystem,
        GatewayProcess(
            tmp_path_factory.mktemp("gateway"), {"p": {"kind": "nfs", "root": str(filesystem.directory)}}
        ) as gateway,
    ):
        pool = filesystem.directory
        for kind in KINDS:
            make_image(kind, pool / f"{kind}.raw", 1024 * MIB, FILES)
        subprocess.run(
            ["qemu-img", "convert", "-O", "qcow2", "-c", pool / "ext4.raw", pool / "packed.qcow2"], check=True
        )
        (pool / "noise.raw").write_bytes(os.urandom(8 * MIB))
        yield Images(gateway, pool, tmp_path_factory.mktemp("scratch"))
    state.release()


@pytest.fixture(scope="module")
def snapshot(images: Images) -> Iterator[str]:
    volumes = [f"p/{name}" for name in (*(f"{kind}.raw" for kind in KINDS), "packed.qcow2", "noise.raw")]
    images.cli("snapshot", "create", "all", *volumes, check=True)
    yield "all"
    images.cli("snapshot", "delete", "all", "--yes", check=True)


@contextmanager
def mounted(images: Images, *words: str | Path) -> Iterator[Path]:
    directory = images.scratch / f"mnt{time.monotonic_ns()}"
    images.cli("mount", *words, directory, check=True)
    try:
        yield directory
    finally:
        images.cli("umount", "--lazy", directory)


@contextmanager
def kernel(images: Images, kind: Kind) -> Iterator[Path]:
    directory = images.scratch / f"kernel-{kind}"
    directory.mkdir()
    mount_image(kind, images.pool / f"{kind}.raw", directory)
    try:
        yield directory
    finally:
        unmount(directory)
        directory.rmdir()


def parsers_of(directory: Path) -> list[psutil.Process]:
    """The parsers of the process that serves a mount, which has its place in its command line."""
    servers = [one for one in psutil.process_iter(["cmdline"]) if str(directory) in (one.info["cmdline"] or ())]
    return [child for one in servers for child in one.children() if "clients.files.worker" in child.cmdline()]


def comparable(tree: dict[bytes, tuple[object, ...]]) -> dict[bytes, tuple[object, ...]]:
    """Without the targets of links that are shown elsewhere than the guest wrote, so that they stay in the tree."""
    return {
        name: described[:-1] if described[0] == stat.S_IFLNK and described[-1][:1] in (b"/", b".") else described  # type: ignore[index]
        for name, described in tree.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_mounted_files_are_what_the_kernel_sees(images: Images, snapshot: str, kind: Kind) -> None:
    posix = kind in POSIX
    with mounted(images, snapshot) as directory:
        tree = directory / "files" / f"{kind}.raw" / "whole"
        ours = described(tree, posix=posix)
        taken = sum(path.lstat().st_blocks for path in tree.rglob("*") if path.is_file()) * 512
    if kind == "vfat":
        assert len(ours) > FILES
        return
    with kernel(images, kind) as mine:
        theirs = described(mine, posix=posix)
        really = sum(path.lstat().st_blocks for path in mine.rglob("*") if path.is_file()) * 512
    assert 0.8 < taken / really < 1.2
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
        subprocess.run(["mount", "-o", "loop,ro,noload", packed, place], check=True)
        try:
            assert any(place.iterdir())
        finally:
            unmount(place)


def test_a_mount_gives_no_rights(images: Images, snapshot: str) -> None:
    with mounted(images, snapshot) as directory:
        table = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        ours = [line[3].split(",") for line in table if line[1].startswith(str(directory))]
        assert len(ours) >= 6
        for options in ours:
            assert {"ro", "nosuid", "nodev", "noexec"} <= set(options)
        with pytest.raises(OSError, match="Read-only"):
            (directory / "files" / "new").write_text("x")
        root = directory / "files" / "ext4.raw" / "whole"
        for path in root.rglob("*.ln"):
            target = os.path.normpath(os.path.join(path.parent, os.readlink(path)))
            assert target.startswith(str(root))
        parsers = parsers_of(directory)
        assert len(parsers) >= len(KINDS)
        for process in parsers:
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert "Seccomp:\t2" in status
            assert "NoNewPrivs:\t1" in status
            assert "Uid:\t65534" in status


def test_what_cannot_be_read_says_why(images: Images, snapshot: str) -> None:
    with mounted(images, snapshot) as directory:
        why = (directory / "files" / "noise.raw" / "whole" / "WHY-NOT.txt").read_text()
        assert "losetup" in why
        assert "journal" in (directory / "files" / "xfs.raw" / "whole.NOTICE.txt").read_text()
    told = json.loads(images.cli("ls", snapshot, "--output", "json", check=True).stdout)
    assert {one["volume"]: one["filesystem"] for one in told}["noise.raw"] == "unknown"


def test_a_parser_that_dies_costs_one_read_and_not_the_mount(images: Images, snapshot: str) -> None:
    with mounted(images, snapshot) as directory:
        tree = directory / "files" / "ext4.raw" / "whole"
        full = [path for path in tree.rglob("file*") if path.is_file() and path.stat().st_size]
        for process in parsers_of(directory):
            process.kill()
        got = {}
        for path in full[:50]:
            try:
                got[path.relative_to(tree)] = path.read_bytes()
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017
        assert len(got) >= 49
        assert sha256(directory / "disks" / "packed.qcow2.raw")
    with kernel(images, "ext4") as mine:
        assert got == {path: (mine / path).read_bytes() for path in got}


def test_damaged_file_systems_never_take_the_mount_down(images: Images) -> None:
    import random

    chance = random.Random(11)
    names = []
    for number in range(6):
        kind = ("ext4", "xfs", "ntfs", "vfat")[number % 4]
        path = images.pool / f"hurt{number}.raw"
        subprocess.run(["cp", "--reflink=auto", images.pool / f"{kind}.raw", path], check=True)
        with path.open("r+b") as file:
            for _ in range(400):
                file.seek(chance.randrange(4 * MIB) if number > 3 else chance.randrange(64 * MIB))
                file.write(chance.randbytes(chance.choice([1, 4, 64])))
        names.append(path.name)
    images.cli("snapshot", "create", "hurt", *(f"p/{name}" for name in names), check=True)
    try:
        with mounted(images, "hurt") as directory:
            for name in names:
                looked = subprocess.run(
                    ["timeout", "60", "find", directory / "files" / name, "-type", "f", "-size", "-20k"],
                    capture_output=True,
                    check=False,
                )
                assert looked.returncode != 124
            assert len(list((directory / "disks").iterdir())) == len(names)
    finally:
        images.cli("snapshot", "delete", "hurt", "--yes", check=True)
        for name in names:
            (images.pool / name).unlink()


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
    assert images.cli("ls", f"{snapshot}:nope").returncode == 3
    assert images.cli("ls", f"{snapshot}:ext4.raw/p9").returncode == 3
    assert images.cli("cat", f"{snapshot}:ext4.raw/whole").returncode == 4
    assert images.cli("restore", f"{snapshot}:ext4.raw/whole").returncode == 2
    elsewhere = {**images.gateway.environment, "FROSTGATE_ADDRESS": f"unix:{images.scratch}/none"}
    told = subprocess.run(
        [FROSTGATE, "mount", snapshot, images.scratch / "empty"], env=elsewhere, capture_output=True, check=False
    )
    assert told.returncode == 5
    assert b"Traceback" not in told.stderr
    assert str(images.scratch / "empty") not in Path("/proc/self/mounts").read_text()


def test_all_shows_snapshots_as_they_come_and_go(images: Images, snapshot: str) -> None:
    directory = images.scratch / "every"
    images.cli("mount", "--all", directory, check=True)
    try:
        assert snapshot in os.listdir(directory / "no-vm")
        images.cli("snapshot", "create", "later", "p/ext4.raw", check=True)
        time.sleep(2.5)
        assert os.listdir(directory / "no-vm" / "later" / "files" / "ext4.raw" / "whole")
        images.cli("snapshot", "delete", "later", "--yes", check=True)
        time.sleep(2.5)
        assert "later" not in os.listdir(directory / "no-vm")
    finally:
        images.cli("umount", "--lazy", directory, check=True)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_restored_trees_are_what_the_kernel_sees(images: Images, snapshot: str, kind: Kind) -> None:
    out = images.scratch / f"restored-{kind}"
    told = images.cli("restore", f"{snapshot}:{kind}.raw/whole", out, "--privileged", "--verify", check=True)
    assert "files restored" in told.stdout
    with kernel(images, kind) as mine:
        theirs = comparable(described(mine, posix=True))
    ours = comparable(described(out / "whole", posix=True))

    assert ours.keys() == theirs.keys()
    assert {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]} == {}
    used = sum(path.lstat().st_blocks for path in out.rglob("*")) * 512
    assert used < 400 * MIB
    again = images.cli("restore", f"{snapshot}:{kind}.raw/whole", out, "--privileged", check=True)
    assert again.stdout.startswith("0 files restored")
    shutil.rmtree(out)


def test_a_restore_that_was_killed_goes_on(images: Images, snapshot: str) -> None:
    out = images.scratch / "killed"
    command = [FROSTGATE, "restore", f"{snapshot}:ext4.raw/whole", out]
    with subprocess.Popen(command, env=images.gateway.environment) as first:
        deadline = time.monotonic() + 30
        while not list(out.glob("whole/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        first.kill()
    told = images.cli("restore", f"{snapshot}:ext4.raw/whole", out, "--privileged", "--verify", check=True)
    assert "were there already" in told.stdout
    assert not list(out.rglob("*.frostgate-partial"))
    shutil.rmtree(out)


def test_ls_cat_find_and_diff_need_no_mount(images: Images, snapshot: str) -> None:
    with kernel(images, "ext4") as mine:
        plain = sorted(path.name for path in mine.iterdir() if b"\xff" not in os.fsencode(path.name))
        one = next(path for path in mine.rglob("file*") if path.is_file() and path.stat().st_size > 5000)
        where, content = one.relative_to(mine), one.read_bytes()
        count = sum(1 for _ in mine.rglob("*"))
    told = json.loads(images.cli("ls", f"{snapshot}:ext4.raw/whole", "--output", "json", check=True).stdout)
    assert [entry["name"] for entry in told if "\udcff" not in entry["name"]] == plain
    command = [FROSTGATE, "cat", f"{snapshot}:ext4.raw/whole/{where}"]
    got = subprocess.run(command, env=images.gateway.environment, capture_output=True, check=True)
    assert got.stdout == content
    found = images.cli("find", f"{snapshot}:ext4.raw/whole", check=True).stdout.splitlines()
    assert len(found) == count
    few = images.cli("find", f"{snapshot}:ext4.raw/whole", "--name", one.name, "--type", "f", check=True)
    assert few.stdout.splitlines() == [f"ext4.raw/whole/{where}"]

    directory = images.scratch / "change"
    directory.mkdir()
    subprocess.run(["cp", "--reflink=auto", images.pool / "ext4.raw", images.pool / "moves.raw"], check=True)
    images.cli("snapshot", "create", "before", "p/moves.raw", check=True)
    subprocess.run(["mount", "-o", "loop", images.pool / "moves.raw", directory], check=True)
    try:
        (directory / where).write_bytes(b"other")
        (directory / "new file").write_text("new")
        gone = next(path for path in directory.rglob("sp ace*.txt") if path.is_file())
        gone.unlink()
        gone = gone.relative_to(directory)
    finally:
        unmount(directory)
    images.cli("snapshot", "create", "after", "p/moves.raw", check=True)
    told = images.cli("diff", "before:moves.raw", "after", "--output", "json", check=True)
    changes = {(one["change"], one["path"].removeprefix("moves.raw/whole/")) for one in json.loads(told.stdout)}
    assert {("M", str(where)), ("A", "new file"), ("D", str(gone))} <= changes
    assert len(changes) <= 4
    for name in ("before", "after"):
        images.cli("snapshot", "delete", name, "--yes", check=True)
    (images.pool / "moves.raw").unlink()
