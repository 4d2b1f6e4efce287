"""Restored as root, from file systems that want to be somewhere else: nothing outside the destination changes."""

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.filesystems import unmount
from tests.lab.images import described, mount_image
from tests.mounting import MIB, Images, image_pool, taken


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    with image_pool(tmp_path_factory.mktemp("outside"), "outside-pool", 1024 * MIB) as made:
        yield made


@pytest.fixture
def host(images: Images) -> Iterator[Path]:
    """A directory of this host that no restore names; it stays as it is."""
    directory = images.scratch / "host"
    (directory / "sub").mkdir(parents=True)
    (directory / "precious").write_text("precious")
    os.mkfifo(directory / "pipe", 0o600)
    os.chmod(directory, 0o751)
    before = described(directory, posix=True), directory.stat()
    yield directory
    after = described(directory, posix=True), directory.stat()
    assert after[0] == before[0]
    assert (after[1].st_mode, after[1].st_uid, after[1].st_mtime_ns) == (
        before[1].st_mode, before[1].st_uid, before[1].st_mtime_ns,
    )  # fmt: skip
    subprocess.run(["rm", "-r", directory], check=True)


@contextmanager
def filled(images: Images, name: str) -> Iterator[Path]:
    """Make an image that is an ext4; yields it mounted, to be filled."""
    image = images.pool / name
    with image.open("wb") as file:
        file.truncate(40 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    directory = images.scratch / f"fill-{name}"
    directory.mkdir()
    mount_image("ext4", image, directory, writable=True)
    try:
        yield directory
    finally:
        unmount(directory)
        directory.rmdir()


def evil(directory: Path) -> None:
    (directory / "sub").mkdir(parents=True)
    for name in ("precious", "cron-evil", "sub/cron-evil"):
        (directory / name).write_text("evil")
    os.symlink("/etc/passwd", directory / "link")
    os.mkfifo(directory / "pipe", 0o666)
    for path in (directory, directory / "precious", directory / "sub", directory / "pipe"):
        os.chown(path, 4711, 4711)
        os.chmod(path, 0o777)


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_link_of_an_earlier_restore_is_not_followed(images: Images, host: Path, ending: str) -> None:
    out = images.scratch / f"earlier{len(ending)}"
    out.mkdir()
    destination = f"{out}/" if ending else out / "data"
    with filled(images, "first.raw") as root:
        os.symlink(host, root / "data")
    with filled(images, "second.raw") as root:
        evil(root / "data")
    with filled(images, "third.raw") as root:
        (root / "data").mkdir(0o777)
        os.chown(root / "data", 4711, 4711)
    with taken(images, "planted", "first.raw", "second.raw", "third.raw"):
        images.cli("restore", "planted:first.raw/whole/data", destination, check=True)
        assert os.readlink(out / "data") == str(host)
        for name in ("second", "third"):
            told = images.cli("restore", f"planted:{name}.raw/whole/data", destination)
            assert told.returncode == 4
            assert "what is there is no directory" in told.stderr
        # of several places the others are restored nevertheless
        told = images.cli("restore", "planted:second.raw/whole/data", "planted:second.raw/whole/data/sub", f"{out}/")
        assert told.returncode == 1
        assert f"{out}/data: what is there is no directory" in told.stderr
        assert os.listdir(out / "sub") == ["cron-evil"]
    assert os.readlink(out / "data") == str(host)


def test_links_within_the_destination_are_not_followed(images: Images, host: Path) -> None:
    out = images.scratch / "within"
    out.mkdir()
    with filled(images, "links.raw") as root:
        (root / "tree").mkdir()
        os.symlink(host, root / "tree" / "conf")
        os.symlink(host / "precious", root / "tree" / "precious")
        os.symlink(host / "pipe", root / "tree" / "pipe")
    with filled(images, "trees.raw") as root:
        evil(root / "tree" / "conf")
        (root / "tree" / "precious").write_text("evil")
        os.mkfifo(root / "tree" / "pipe", 0o666)
        (root / "tree" / "last").write_text("the rest goes on")
        os.link(root / "tree" / "conf" / "cron-evil", root / "tree" / "zlinked")
    with taken(images, "nested", "links.raw", "trees.raw"):
        images.cli("restore", "nested:links.raw/whole/tree", out, check=True)
        told = images.json("restore", "nested:links.raw/whole/tree", out)  # again
        assert told["problems"] == []
        done = images.cli("restore", "nested:trees.raw/whole/tree", out)
        assert done.returncode == 1
        assert done.stderr.strip() == f"{out}/conf: what is there is no directory; nothing is restored below it"
    assert (out / "last").read_text() == "the rest goes on"
    assert (out / "zlinked").read_text() == "evil"
    assert os.readlink(out / "conf") == str(host)
    assert stat.S_ISREG((out / "precious").lstat().st_mode)
    assert stat.S_ISFIFO((out / "pipe").lstat().st_mode)


def test_places_of_one_name_and_names_that_are_there_twice(images: Images, host: Path) -> None:
    with filled(images, "twice.raw") as root:
        (root / "one").mkdir()
        os.symlink(host, root / "one" / "conf")
        evil(root / "two" / "conf")
    # a directory in which "conf" is there twice, as only a crafted file system has it
    image = images.pool / "twice.raw"
    script = "link /two/conf /one/conf\nmkdir /both\nlink /one/conf /both/conf\nlink /two/conf /both/conf\n"
    subprocess.run(["debugfs", "-w", "-f", "-", image], input=script, text=True, check=True, capture_output=True)
    out = images.scratch / "twice"
    with taken(images, "twice", "twice.raw"):
        refused = images.cli("restore", "twice:twice.raw/whole/one/conf", "twice:twice.raw/whole/two/conf", out)
        assert refused.returncode == 2
        assert not out.exists()
        images.cli("restore", "twice:twice.raw/whole/one", out)
        images.cli("restore", "twice:twice.raw/whole/both", out)
        images.cli("restore", "twice:twice.raw/whole", out)


def test_who_names_a_link_means_where_it_leads(images: Images) -> None:
    real, link = images.scratch / "real", images.scratch / "link"
    real.mkdir()
    os.symlink(real, link)
    with filled(images, "plain.raw") as root:
        (root / "file").write_text("content")
    with taken(images, "plain", "plain.raw"):
        for destination in (f"{link}/", link / "again"):
            images.cli("restore", "plain:plain.raw/whole/file", destination, check=True)
    assert sorted(os.listdir(real)) == ["again", "file"]
    assert link.is_symlink()
