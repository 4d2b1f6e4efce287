"""`find`, `diff` and `ls` say what they could not read, show the rest, and are not led astray by names."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway_process import FROSTGATE
from tests.holding_proxy import HoldingProxy
from tests.lab.filesystems import make_filesystem, unmount
from tests.lab.images import mount_image
from tests.mounting import MIB, Images, image_pool, parsers_of, taken

FORGED = "x\n-rw-r--r--   1     0     0            5 2026-01-01 00:00 passwd\x1b[2J"
SHOWN = "x\\n-rw-r--r--   1     0     0            5 2026-01-01 00:00 passwd\\x1b[2J"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    with image_pool(tmp_path_factory.mktemp("finding"), "finding-pool", 4096 * MIB) as made:
        good = made.pool / "good.raw"
        make_filesystem("ext4", good, 32 * MIB)
        place = made.scratch / "fill"
        place.mkdir()
        mount_image("ext4", good, place, writable=True)
        try:
            for directory in ("lost", "lost/deeper", "kept", "names"):
                (place / directory).mkdir()
            for path in ("lost/one", "lost/deeper/two", "kept/same", "kept/changes", "kept/goes", f"names/{FORGED}"):
                (place / path).write_text(path)
        finally:
            unmount(place)
        for name, path in (("lost.raw", "/lost"), ("rootless.raw", "/")):
            damaged(good, made.pool / name, path)
        for tool, name in (("mkfs.btrfs", "btrfs.raw"), ("mkswap", "swap.raw")):
            with (made.pool / name).open("wb") as file:
                file.truncate(128 * MIB)
            subprocess.run([tool, made.pool / name], check=True, capture_output=True)
        yield made


def damaged(source: Path, image: Path, path: str) -> None:
    """Copy an image; there, a directory's extents are broken."""
    subprocess.run(["cp", "--reflink=auto", source, image], check=True)
    command = ["debugfs", "-w", "-R", f"set_inode_field {path} block[0] 0", image]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def before(images: Images) -> Iterator[str]:
    with taken(images, "before", "rootless.raw", "good.raw", "lost.raw", "btrfs.raw", "swap.raw") as name:
        yield name


@pytest.fixture(scope="module")
def after(images: Images, before: str) -> Iterator[str]:
    place = images.scratch / "change"
    place.mkdir()
    mount_image("ext4", images.pool / "good.raw", place, writable=True)
    try:
        (place / "kept" / "changes").write_text("something else")
        (place / "kept" / "goes").unlink()
        (place / "kept" / "comes").touch()
    finally:
        unmount(place)
    damaged(images.pool / "good.raw", images.pool / "lost.raw", "/lost")
    with taken(images, "after", "rootless.raw", "good.raw", "lost.raw", "btrfs.raw", "swap.raw") as name:
        yield name


def test_find_goes_on_after_what_it_cannot_read_and_says_it(images: Images, before: str) -> None:
    told = images.cli("find", before)
    assert told.returncode == 1
    found = told.stdout.splitlines()
    assert {"good.raw/whole/lost/deeper/two", "lost.raw/whole/kept/same"} <= set(found)
    assert not [path for path in found if path.startswith(("rootless", "btrfs", "swap", "lost.raw/whole/lost/"))]
    said = told.stderr
    assert "damaged: rootless.raw/whole (" in said
    assert "damaged: btrfs.raw/whole (Not shown: no maintained library reads Btrfs" in said
    assert "damaged: lost.raw/whole/lost\n" in said
    assert "swap" not in said
    assert "good.raw" not in said
    for place, code in (("btrfs.raw", 1), ("good.raw", 0), ("swap.raw", 0), ("p/good.raw/whole/kept", 0)):
        assert images.cli("find", f"{before}:{place}").returncode == code


def test_with_json_standard_error_is_json_lines_as_well(images: Images, before: str) -> None:
    told = images.cli("find", before, "--output", "json")
    assert {"path": "good.raw/whole/kept/same", "type": "-", "size_bytes": 9} in map(
        json.loads, told.stdout.splitlines()
    )
    lines = [json.loads(line) for line in told.stderr.splitlines()]
    assert {line["damaged"] for line in lines[:-1] if "damaged" in line} == {
        "rootless.raw/whole",
        "btrfs.raw/whole",
        "lost.raw/whole/lost",
    }
    assert lines[-1]["exit_code"] == told.returncode == 1
    missing = images.cli("cat", f"{before}:good.raw/whole/nothing", "-O", "json")
    assert json.loads(missing.stderr)["exit_code"] == missing.returncode == 3
    for words in (("cat", "-O", "json"), ("find", "x", "--nonsense", "--output=json"), ("-O", "json", "nonsense")):
        wrong = images.cli(*words)
        assert json.loads(wrong.stderr)["exit_code"] == wrong.returncode == 2


def test_diff_shows_the_rest_and_says_what_it_could_not_compare(images: Images, before: str, after: str) -> None:
    told = images.cli("diff", before, after)
    assert told.returncode == 1
    changes = ["M {}/whole/kept/changes", "A {}/whole/kept/comes", "D {}/whole/kept/goes"]
    lines = [line.format(name) for name in ("good.raw", "lost.raw") for line in changes]
    assert sorted(told.stdout.splitlines()) == sorted(lines)
    for snapshot in (before, after):
        for place in ("rootless.raw/whole (", "btrfs.raw/whole (", "lost.raw/whole/lost\n"):
            assert f"damaged: {snapshot}:{place}" in told.stderr
    assert "compared" in told.stderr
    assert images.cli("diff", f"{before}:good.raw", after).returncode == 0


def test_diff_calls_nothing_new_that_lies_in_what_was_damaged(images: Images, before: str, after: str) -> None:
    # what was damaged is whole now
    subprocess.run(["cp", "--reflink=auto", images.pool / "good.raw", images.pool / "lost.raw"], check=True)
    with taken(images, "healed", "lost.raw") as healed:
        for pair in ((before, healed), (healed, before)):
            told = images.cli("diff", f"{pair[0]}:lost.raw", pair[1])
            assert told.returncode == 1
            assert len(told.stdout.splitlines()) == 3
            assert "/lost" not in told.stdout
            assert f"damaged: {before}:lost.raw/whole/lost" in told.stderr


def test_diff_compares_one_place(images: Images, before: str, after: str) -> None:
    told = images.cli("diff", f"{before}:good.raw/whole/kept", f"{after}:good.raw/whole")
    assert told.returncode == 2
    assert "same place" in told.stderr
    same = images.cli("diff", f"{before}:good.raw/whole/kept", f"{after}:good.raw/whole/kept/", check=True)
    assert len(same.stdout.splitlines()) == 3
    missing = images.cli("diff", f"{before}:good.raw/whole/kept/goes", after)
    assert missing.returncode == 3
    assert f"{after}:good.raw/whole/kept/goes" in missing.stderr


def test_names_forge_no_lines(images: Images, before: str, after: str) -> None:
    place = f"{before}:good.raw/whole/names"
    (line,) = images.cli("ls", place, check=True).stdout.splitlines()
    assert line.endswith(f" {SHOWN}")
    assert images.cli("find", place, check=True).stdout == f"good.raw/whole/names/{SHOWN}\n"
    exact = subprocess.run(
        [FROSTGATE, "find", place, "--print0"], env=images.gateway.environment, capture_output=True, check=True
    )
    assert exact.stdout == f"good.raw/whole/names/{FORGED}\0".encode()
    assert images.json("ls", place)[0]["name"] == FORGED


def test_a_volume_can_be_named_with_its_pool(images: Images, before: str) -> None:
    for place in ("good.raw", "p/good.raw"):
        (one,) = images.json("ls", f"{before}:{place}")
        assert (one["volume"], one["partition"], one["filesystem"]) == ("good.raw", "whole", "ext")
    assert images.cli("ls", f"{before}:p/nope").returncode == 3


def test_a_full_disk_is_no_missing_volume(images: Images, before: str) -> None:
    with Path("/dev/full").open("wb") as full:
        told = subprocess.run(
            [FROSTGATE, "cat", f"{before}:good.raw/whole/kept/same"],
            env=images.gateway.environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert told.returncode == 4
    assert "No space left" in told.stderr
    assert "good.raw/whole/kept/same" in told.stderr


def test_an_interruption_is_json_too(images: Images, before: str) -> None:
    with HoldingProxy(images.gateway.address, images.scratch / "held.sock", "GetGroupSnapshot") as proxy:
        command = ["env", "--default-signal=INT", FROSTGATE, "--address", proxy.address, "find", before, "-O", "json"]
        with subprocess.Popen(command, env=images.gateway.environment, stderr=subprocess.PIPE, text=True) as found:
            assert proxy.held.wait(60)
            found.send_signal(signal.SIGINT)
            _, said = found.communicate(timeout=120)
    assert found.returncode == 130
    assert json.loads(said) == {"error": "interrupted", "exit_code": 130}


def test_ctrl_c_is_not_for_the_parsers(images: Images, before: str) -> None:
    directory = images.scratch / "mnt"
    command = ["env", "--default-signal=INT", FROSTGATE, "mount", before, directory, "--foreground"]
    with subprocess.Popen(
        command,
        env=images.gateway.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as mount:
        assert mount.stdout
        assert str(directory) in mount.stdout.readline()
        assert (directory / "files/good.raw/whole/kept/same").read_text() == "kept/same"
        assert parsers_of(directory)
        os.killpg(mount.pid, signal.SIGINT)  # as a terminal does, to all that is in its foreground
        _, said = mount.communicate(timeout=120)
    assert "Traceback" not in said
    assert not os.path.ismount(directory)
