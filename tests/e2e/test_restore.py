"""Files and trees brought back: whole, verified, again after whatever interrupted it; and read without a mount."""

import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway_process import FROSTGATE
from tests.lab.filesystems import unmount
from tests.lab.images import Kind, described, make_image
from tests.mounting import MIB, Images, image_pool, kernel, taken

FILES = 1000
KINDS: tuple[Kind, ...] = ("ext4", "xfs")
LARGE_BYTES = 400 * MIB


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    with image_pool(tmp_path_factory.mktemp("restore"), "restore-pool") as made:
        for kind in KINDS:
            make_image(kind, made.pool / f"{kind}.raw", 600 * MIB, FILES)
        large = made.pool / "large.raw"
        with large.open("wb") as file:
            file.truncate(LARGE_BYTES + 100 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", large], check=True)
        place = made.scratch / "fill"
        place.mkdir()
        subprocess.run(["mount", "-o", "loop", large, place], check=True)
        try:
            with (place / "large").open("wb") as file:
                for _ in range(LARGE_BYTES // MIB):
                    file.write(os.urandom(MIB))
        finally:
            unmount(place)
        yield made


@pytest.fixture(scope="module")
def snapshot(images: Images) -> Iterator[str]:
    with taken(images, "all", *(f"{kind}.raw" for kind in KINDS), "large.raw") as made:
        yield made


def start(images: Images, *words: str | Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [FROSTGATE, *words],
        env=images.gateway.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that started us in the background has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )


def wait_for_bytes(path: Path, size_bytes: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 200
    while not (path.exists() and path.stat().st_size >= size_bytes):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_restored_trees_are_what_the_kernel_sees(images: Images, snapshot: str, kind: Kind) -> None:
    out = images.scratch / f"restored-{kind}"
    place = f"{snapshot}:{kind}.raw/whole"
    told = images.json("restore", place, out, "--privileged", "--verify")
    assert told["problems"] == []
    with kernel(images, kind) as mine:
        theirs = described(mine, posix=True)
        really = sum(path.lstat().st_blocks for path in mine.rglob("*")) * 512
    ours = described(out / "whole", posix=True)
    assert ours.keys() == theirs.keys()
    assert {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]} == {}
    used = sum(path.lstat().st_blocks for path in out.rglob("*")) * 512
    assert used < 1.3 * really
    again = images.json("restore", place, out, "--privileged")
    assert (again["files"], again["unchanged"]) == (0, told["files"])
    shutil.rmtree(out)


def test_a_tree_whose_restore_was_killed_goes_on(images: Images, snapshot: str) -> None:
    out = images.scratch / "killed"
    place = f"{snapshot}:ext4.raw/whole"
    with start(images, "restore", place, out) as first:
        deadline = time.monotonic() + 200
        while len(list(out.glob("whole/**/*"))) < 100:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.kill()
    told = images.json("restore", place, out, "--privileged", "--verify")
    assert told["unchanged"] > 0
    assert told["problems"] == []
    assert not list(out.rglob("*.frostgate-partial"))
    with kernel(images, "ext4") as mine:
        theirs = described(mine, posix=True)
    assert described(out / "whole", posix=True) == theirs
    shutil.rmtree(out)


def test_a_large_file_goes_on_where_it_was_and_verify_finds_what_changed_meanwhile(
    images: Images, snapshot: str
) -> None:
    out = images.scratch / "large"
    out.mkdir()
    partial = out / ".large.frostgate-partial"
    place = f"{snapshot}:large.raw/whole/large"
    with start(images, "restore", place, out) as first:
        wait_for_bytes(partial, 200 * MIB, first)
        first.kill()
    assert not (out / "large").exists()
    kept = partial.stat().st_ino
    with partial.open("r+b") as file:  # what was synced already is not read again: so this stays, until verified
        before = file.read(4)
        file.seek(0)
        file.write(b"else")
    told = images.json("restore", place, out)
    assert told["files"] == 1
    assert (out / "large").stat().st_ino == kept
    assert (out / "large").read_bytes()[:4] == b"else"
    found = images.cli("restore", place, out, "--verify")
    assert found.returncode == 1
    assert "differs from the snapshot near byte 0" in found.stderr
    with (out / "large").open("r+b") as file:
        file.write(before)
    with kernel(images, "ext4", images.pool / "large.raw") as mine, (mine / "large").open("rb") as theirs:
        wanted = hashlib.file_digest(theirs, "sha256").hexdigest()
    with (out / "large").open("rb") as ours:
        assert hashlib.file_digest(ours, "sha256").hexdigest() == wanted
    shutil.rmtree(out)


def test_ctrl_c_ends_a_restore_with_its_code_and_no_half_file(images: Images, snapshot: str) -> None:
    out = images.scratch / "interrupted"
    out.mkdir()
    place = f"{snapshot}:large.raw/whole/large"
    with start(images, "restore", place, out) as process:
        wait_for_bytes(out / ".large.frostgate-partial", 20 * MIB, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert os.listdir(out) == [".large.frostgate-partial"]
    shutil.rmtree(out)


def test_a_restore_on_a_terminal_shows_rate_and_time_left(images: Images, snapshot: str) -> None:
    ours, theirs = pty.openpty()
    command = [FROSTGATE, "restore", f"{snapshot}:large.raw/whole/large", images.scratch / "shown"]
    environment = {**images.gateway.environment, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, env=environment, stderr=theirs, stdout=subprocess.DEVNULL) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            seen += part
            if not part:
                break
        os.close(ours)
    assert process.returncode == 0
    assert b"B/s" in seen
    assert b"0:0" in seen
    (images.scratch / "shown").unlink()


def test_places_and_destinations_that_make_no_sense_change_nothing(images: Images, snapshot: str) -> None:
    out = images.scratch / "nothing"
    file = f"{snapshot}:large.raw/whole/large"
    for words, code in (
        ((file,), 2),
        ((":large.raw/whole/large", out), 2),
        ((file, f"other:{out}", out), 2),
        (("nope:large.raw/whole/large", out), 3),
        ((f"{snapshot}:nope/whole/large", out), 3),
        ((f"{snapshot}:large.raw/p7/large", out), 3),
        ((f"{snapshot}:large.raw/whole/none", out), 3),
        ((f"{snapshot}:large.raw/whole/large/below", out), 3),
        ((file, "/proc/nothing/x"), 3),
        ((file, "relative", "--into-guest", "web1"), 2),
        ((file, "/x", "--into-guest", "web1", "--connect", "qemu+unix:///system?socket=/nobody"), 1),
        ((file, out, "--key-file", images.scratch / "none"), 2),
    ):
        told = images.cli("restore", *words)
        assert told.returncode == code, (words, told.stderr)
        assert told.stderr.startswith("error: ")
        assert "Traceback" not in told.stderr
    assert not out.exists()
    missing = json.loads(images.cli("restore", "nope:x/whole/y", out, "--output", "json").stderr)
    assert missing["reason"] == "GROUP_SNAPSHOT_NOT_FOUND"


def test_without_a_gateway_every_command_says_so(images: Images) -> None:
    away = {"FROSTGATE_ADDRESS": f"unix:{images.scratch}/nobody"}
    for words in (
        ("cat", "x:a/whole/b"),
        ("diff", "x", "y"),
        ("restore", "x:a/whole/b", images.scratch / "out"),
        ("mount", "x", images.scratch / "out"),
        ("mount", "--all", images.scratch / "out"),
    ):
        told = images.cli(*words, env=away)
        assert told.returncode == 5, words
        assert "no gateway answers" in told.stderr
        assert "Traceback" not in told.stderr


def test_ls_cat_and_find_say_what_the_kernel_does(images: Images, snapshot: str) -> None:
    root = f"{snapshot}:ext4.raw/whole"
    with kernel(images, "ext4") as mine:
        names = sorted(os.listdir(os.fsencode(mine)))
        one = next(path for path in mine.rglob("file*") if path.is_file() and path.stat().st_size > 5000)
        where, content = one.relative_to(mine), one.read_bytes()
        paths = {os.fsencode(path.relative_to(mine)) for path in mine.rglob("*")}
        links = {os.fsencode(path.relative_to(mine)) for path in mine.rglob("*") if path.is_symlink()}
        status = one.lstat()
    assert [os.fsencode(entry["name"]) for entry in images.json("ls", root)] == names
    (entry,) = images.json("ls", f"{root}/{where}")
    assert (entry["size_bytes"], entry["uid"], entry["gid"], entry["links"]) == (
        status.st_size, status.st_uid, status.st_gid, status.st_nlink,
    )  # fmt: skip
    assert one.name in images.cli("ls", f"{root}/{where.parent}", check=True).stdout
    command = [FROSTGATE, "cat", f"{root}/{where}"]
    got = subprocess.run(command, env=images.gateway.environment, capture_output=True, check=True)
    assert got.stdout == content
    command = [FROSTGATE, "find", root, "--print0"]
    got = subprocess.run(command, env=images.gateway.environment, capture_output=True, check=True)
    assert {path.removeprefix(b"ext4.raw/whole/") for path in got.stdout.rstrip(b"\0").split(b"\0")} == paths
    few = images.cli("find", root, "--name", one.name, "--type", "f", check=True)
    assert few.stdout.splitlines() == [f"ext4.raw/whole/{where}"]
    listed = images.cli("find", root, "--type", "l", "--output", "json", check=True).stdout.splitlines()
    assert {os.fsencode(json.loads(line)["path"]).removeprefix(b"ext4.raw/whole/") for line in listed} == links
    assert images.cli("cat", root).returncode == 4
    assert images.cli("cat", f"{root}/nothing").returncode == 3
    assert images.cli("find", f"{snapshot}:nope").returncode == 3
    assert images.cli("ls", "nope").returncode == 3


def test_who_reads_no_further_is_no_error(images: Images, snapshot: str) -> None:
    command = f"{FROSTGATE} cat {snapshot}:large.raw/whole/large | head -c 10 | wc -c; echo ${{PIPESTATUS[0]}}"
    told = subprocess.run(
        ["bash", "-c", command], env=images.gateway.environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["10", "0"]
    assert told.stderr == ""


def test_diff_tells_what_changed_and_nothing_else(images: Images) -> None:
    place = images.scratch / "change"
    place.mkdir()
    moves = images.pool / "moves.raw"
    subprocess.run(["cp", "--reflink=auto", images.pool / "ext4.raw", moves], check=True)
    with taken(images, "before", "moves.raw"):
        subprocess.run(["mount", "-o", "loop", moves, place], check=True)
        try:
            plain = [path for path in place.rglob("file*") if path.is_file() and path.lstat().st_nlink == 1]
            plain = [path for path in plain if path.stat().st_size > 100 and path.suffix == ""]
            written, grown, owned, gone, moved, attributed = sorted(plain)[:6]
            status = written.stat()
            content = bytearray(written.read_bytes())
            content[50] ^= 1
            written.write_bytes(content)
            os.utime(written, ns=(status.st_atime_ns, status.st_mtime_ns))  # the change of its inode tells
            with grown.open("ab") as file:
                file.write(b"more")
            os.chown(owned, 4242, 4242)
            gone.unlink()
            moved.rename(place / "moved here")
            os.setxattr(attributed, "user.new", b"1")
            (place / "new directory").mkdir()
            (place / "new directory" / "new file").write_text("new")
            changed = [path.relative_to(place) for path in (written, grown, owned, attributed)]
            removed = [path.relative_to(place) for path in (gone, moved)]
        finally:
            unmount(place)
        with taken(images, "after", "moves.raw"):
            told = images.json("diff", "before:moves.raw", "after")
            changes = {(one["change"], one["path"].removeprefix("moves.raw/whole/")) for one in told}
            assert changes == {
                *(("M", str(path)) for path in changed),
                *(("D", str(path)) for path in removed),
                *(("A", path) for path in ("moved here", "new directory", "new directory/new file")),
            }
            assert images.json("diff", "after", "after") == []
            words = images.cli("diff", "before:moves.raw/whole/new directory", "after", check=False)
            assert words.returncode == 3
            inner = images.cli("diff", "after:moves.raw/whole/new directory", "after", "--contents", check=True)
            assert inner.stdout == ""
            text = images.cli("diff", "before:moves.raw", "after", check=True).stdout.splitlines()
            assert "A moves.raw/whole/new directory/new file" in text
    assert images.cli("diff", "before", "after").returncode == 3
    moves.unlink()
