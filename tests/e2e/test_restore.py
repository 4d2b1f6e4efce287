"""Files and trees brought back: whole, verified, again after whatever interrupted it; and read without a mount."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway_process import FROSTGATE
from tests.lab.disk import sha256
from tests.lab.filesystems import mount_loop, unmount
from tests.lab.images import Kind, described, make_image
from tests.mounting import MIB, Images, image_pool, kernel, taken

FILES = 1000
PARTIAL = ".large.*.frostgate-partial"
KINDS: tuple[Kind, ...] = ("ext4", "xfs")
LARGE_BYTES = 400 * MIB
OTHER_BYTES = 150 * MIB


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    with image_pool(tmp_path_factory.mktemp("restore"), "restore-pool") as made:
        for kind in KINDS:
            make_image(kind, made.pool / f"{kind}.raw", 600 * MIB, FILES)
        large = made.pool / "large.raw"
        with large.open("wb") as file:
            file.truncate(LARGE_BYTES + OTHER_BYTES + 100 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", large], check=True)
        place = made.scratch / "fill"
        place.mkdir()
        mount_loop(large, place)
        try:
            (place / "other").mkdir()
            for name, size in (("large", LARGE_BYTES), ("other/large", OTHER_BYTES)):
                with (place / name).open("wb") as file:
                    for _ in range(size // MIB):
                        file.write(os.urandom(MIB))
            digests = {name: sha256(place / name) for name in ("large", "other/large")}
            (made.scratch / "digests").write_text(json.dumps(digests))
        finally:
            unmount(place)
        yield made


@pytest.fixture(scope="module")
def snapshot(images: Images) -> Iterator[str]:
    with taken(images, "all", *(f"{kind}.raw" for kind in KINDS), "large.raw") as made:
        yield made


def start(images: Images, *words: str | Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        # a shell that started us in the background has it ignored; not by preexec_fn, after which gRPC's threads in
        # this process run in the child as well, and may end it (grpc/grpc#43055)
        ["env", "--default-signal=INT", FROSTGATE, *words],
        env=images.gateway.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_bytes(directory: Path, size_bytes: int, process: "subprocess.Popen[str]") -> Path:
    """Wait for a partial file in a directory; returns it."""
    deadline = time.monotonic() + 200
    while not (found := [path for path in directory.glob(PARTIAL) if path.stat().st_size >= size_bytes]):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found[0]


def written_digest(images: Images, name: str) -> str:
    """The SHA-256 of a file of large.raw as it was when the kernel had written it."""
    digests: dict[str, str] = json.loads((images.scratch / "digests").read_text())
    return digests[name]


@pytest.mark.parametrize("kind", KINDS)
def test_restored_trees_are_what_the_kernel_sees(images: Images, snapshot: str, kind: Kind) -> None:
    out = images.scratch / f"restored-{kind}"
    place = f"{snapshot}:{kind}.raw/whole"
    told = images.json("restore", place, out, "--privileged", "--verify")
    assert told["problems"] == []
    with kernel(images, kind) as mine:
        theirs = described(mine, posix=True)
        really = sum(path.lstat().st_blocks for path in mine.rglob("*")) * 512
    ours = described(out, posix=True)
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
        while len(list(out.glob("**/*"))) < 100:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.kill()
    told = images.json("restore", place, out, "--privileged", "--verify")
    assert told["unchanged"] > 0
    assert told["problems"] == []
    assert not list(out.rglob("*.frostgate-partial"))
    with kernel(images, "ext4") as mine:
        theirs = described(mine, posix=True)
    assert described(out, posix=True) == theirs
    shutil.rmtree(out)


def test_a_large_file_goes_on_where_it_was_and_verify_mends_what_changed_meanwhile(
    images: Images, snapshot: str
) -> None:
    out = images.scratch / "large"
    out.mkdir()
    place = f"{snapshot}:large.raw/whole/large"
    with start(images, "restore", place, f"{out}/") as first:
        partial = wait_for_bytes(out, 200 * MIB, first)
        first.kill()
    assert not (out / "large").exists()
    kept = partial.stat().st_ino
    with partial.open("r+b") as file:  # what was synced already is not read again: so this stays, until verified
        file.write(b"else")
    told = images.json("restore", place, f"{out}/")
    assert told["files"] == 1
    assert (out / "large").stat().st_ino == kept
    assert (out / "large").read_bytes()[:4] == b"else"
    told = images.json("restore", place, f"{out}/", "--verify")
    assert (told["files"], told["repaired"], told["problems"]) == (1, 1, [])
    assert sha256(out / "large") == written_digest(images, "large")
    told = images.json("restore", place, f"{out}/", "--verify")
    assert (told["files"], told["unchanged"], told["repaired"]) == (0, 1, 0)
    shutil.rmtree(out)


def test_what_is_left_of_one_file_never_becomes_part_of_another(images: Images, snapshot: str) -> None:
    out = images.scratch / "mixed"
    out.mkdir()
    with start(images, "restore", f"{snapshot}:large.raw/whole/large", f"{out}/") as first:
        wait_for_bytes(out, 200 * MIB, first)
        first.kill()
    told = images.json("restore", f"{snapshot}:large.raw/whole/other/large", f"{out}/")
    assert told["files"] == 1
    assert sha256(out / "large") == written_digest(images, "other/large")
    assert os.listdir(out) == ["large"]
    shutil.rmtree(out)


def test_a_partial_file_that_others_could_write_is_not_gone_on_with(images: Images, snapshot: str) -> None:
    out = images.scratch / "open"
    out.mkdir()
    place = f"{snapshot}:large.raw/whole/large"
    with start(images, "restore", place, f"{out}/") as first:
        partial = wait_for_bytes(out, 200 * MIB, first)
        first.kill()
    host = images.scratch / "host file"
    partial.rename(host)
    os.link(host, partial)
    before = sha256(host)
    images.json("restore", place, f"{out}/")
    assert sha256(out / "large") == written_digest(images, "large")
    assert sha256(host) == before
    shutil.rmtree(out)
    host.unlink()


def test_a_repeat_of_the_same_command_goes_to_the_same_place(images: Images, snapshot: str) -> None:
    with kernel(images, "ext4") as mine:
        directory = next(path for path in sorted(mine.iterdir()) if path.is_dir() and path.name.startswith("dir"))
        theirs = described(directory, posix=False)
        name = directory.name
    place = f"{snapshot}:ext4.raw/whole/{name}"
    itself, inside = images.scratch / "itself", images.scratch / "made/inside"
    for destination, where in ((itself, itself), (f"{inside}/", inside / name), (f"{inside}/.", inside / name)):
        for _ in range(2):
            told = images.json("restore", place, destination, "--privileged")
            assert told["problems"] == []
            assert described(where, posix=False) == theirs
        assert told["files"] == 0
    assert os.listdir(inside) == [name]
    shutil.rmtree(itself)
    shutil.rmtree(inside.parent)


def test_ctrl_c_ends_a_restore_with_its_code_and_no_half_file(images: Images, snapshot: str) -> None:
    out = images.scratch / "interrupted"
    out.mkdir()
    place = f"{snapshot}:large.raw/whole/large"
    with start(images, "restore", place, f"{out}/") as process:
        partial = wait_for_bytes(out, 20 * MIB, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert os.listdir(out) == [partial.name]
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
        ((file, file, out), 2),
        ((file, ""), 2),
        ((file, "/proc/nothing/x"), 4),
        ((file, images.scratch), 4),
        ((file, f"{images.pool}/ext4.raw/"), 4),
        ((file, "/sys/large"), 7),
        ((f"{snapshot}:large.raw/whole/other", images.pool / "ext4.raw"), 4),
        ((f"{snapshot}:large.raw/whole/other", "/sys/tree"), 7),
        ((file, "relative", "--into-guest", "web1"), 2),
        ((file, "/x", "--into-guest", "web1", "--connect", "qemu+unix:///system?socket=/nobody"), 1),
        ((file, out, "--key-file", images.scratch / "none"), 2),
    ):
        told = images.cli("restore", *words)
        assert told.returncode == code, (words, told.stderr)
        assert told.stderr.startswith("error: ")
        assert "Traceback" not in told.stderr
        assert "b'" not in told.stderr
        if code == 7:
            assert re.search(rf"{words[-1]}: (Permission denied|Operation not permitted)", told.stderr)
    assert not out.exists()
    assert f"{images.scratch}/ would put it in there" in images.cli("restore", file, images.scratch).stderr
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
        mount_loop(moves, place)
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
