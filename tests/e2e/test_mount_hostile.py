"""A guest's disk is its word and no more: damaged and crafted file systems, and parsers that die."""

import contextlib
import errno
import json
import os
import random
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.disk import sha256
from tests.lab.images import Kind, described, make_image
from tests.mounting import MIB, Images, comparable, image_pool, kernel, mounted, parsers_of, taken

KINDS: tuple[Kind, ...] = ("ext4", "xfs", "ntfs", "vfat")
FILES = 300
ROUNDS = 4
PATIENCE_S = 240


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    with image_pool(tmp_path_factory.mktemp("hostile"), "hostile-pool") as made:
        for kind in KINDS:
            make_image(kind, made.pool / f"{kind}.raw", 300 * MIB, FILES)
        subprocess.run(
            ["qemu-img", "convert", "-O", "qcow2", made.pool / "ext4.raw", made.pool / "packed.qcow2"], check=True
        )
        yield made


def look(place: Path) -> None:
    """Read everything, whatever errors that gives; it ends, is what counts."""
    command = ["find", place, "-type", "f", "-size", "-20M", "-exec", "head", "--quiet", "-c", "100000", "{}", "+"]
    subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE_S)


def copied(images: Images, kind: Kind, name: str) -> Path:
    image = images.pool / name
    subprocess.run(["cp", "--reflink=auto", images.pool / f"{kind}.raw", image], check=True)
    return image


def test_damaged_file_systems_never_take_the_mount_down(images: Images) -> None:
    chance = random.Random(11)
    hurt = []
    for kind in KINDS:
        # what is allocated, so that a file system is hit and not its free space
        used = subprocess.run(
            ["qemu-img", "map", "--output=json", images.pool / f"{kind}.raw"],
            check=True,
            capture_output=True,
            text=True,
        )
        ranges = [(one["start"], one["length"]) for one in json.loads(used.stdout) if one["data"]]
        for number in range(ROUNDS):
            image = copied(images, kind, f"hurt-{kind}-{number}.raw")
            with image.open("r+b") as file:
                for _ in range(30 * 10**number):
                    start, length = ranges[0] if number % 2 else chance.choice(ranges)
                    file.seek(start + chance.randrange(length))
                    byte = file.read(1)[0]
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte ^ 1 << chance.randrange(8)]))
            hurt.append(image)
    with taken(images, "hurt", *(image.name for image in hurt), "packed.qcow2"), mounted(images, "hurt") as directory:
        for image in hurt:
            look(directory / "files" / image.name)
        assert len(list((directory / "disks").iterdir())) == len(hurt) + 1
        assert sha256(directory / "disks" / "packed.qcow2.raw") == sha256(images.pool / "ext4.raw")
        with kernel(images, "ext4") as mine:
            theirs = comparable(described(mine, posix=True))
        assert comparable(described(directory / "files" / "packed.qcow2" / "whole", posix=True)) == theirs
        told = images.cli("find", f"hurt:{hurt[2].name}")
        assert "Traceback" not in told.stderr
        told = images.cli("restore", f"hurt:{hurt[2].name}/whole", images.scratch / "hurt")
        assert "Traceback" not in told.stderr
    for image in hurt:
        image.unlink()


def test_a_directory_within_itself_and_impossible_sizes_end(images: Images) -> None:
    image = copied(images, "ext4", "crafted.raw")
    script = "\n".join(
        [
            "mkdir /loop",
            "mkdir /loop/inner",
            "ln /loop /loop/inner/again",
            "write /etc/hostname /huge",
            "sif /huge size 0x3fffffffffff",
            "write /etc/hostname /sparse",
            "sif /sparse size 0x7fffffffff",
            "sif /loop links_count 65000",
            "mkdir /endless",
            "sif /endless size 0x7ffff000",
            "symlink /away /etc/passwd",
            "symlink /up ../../../../../../../../etc/passwd",
            "symlink /loop/up ../../../../../../../../etc/passwd",
            "symlink /self self",
        ]
    )
    subprocess.run(["debugfs", "-w", "-f", "-", image], input=script, text=True, check=True, capture_output=True)
    with taken(images, "crafted", "crafted.raw"), mounted(images, "crafted") as directory:
        root = directory / "files" / "crafted.raw" / "whole"
        subprocess.run(["find", root], capture_output=True, check=False, timeout=PATIENCE_S)
        with contextlib.suppress(OSError), (root / "huge").open("rb") as file:
            os.pread(file.fileno(), 4096, 1 << 40)  # zeros or an error, and no end of it all
        for link in ("away", "up", "loop/up"):
            target = os.path.normpath(os.path.join((root / link).parent, os.readlink(root / link)))
            assert target.startswith(f"{root}/")
            assert not os.path.exists(root / link)
        with pytest.raises(OSError) as refused:
            (root / "self").stat()
        assert refused.value.errno == errno.ELOOP
        told = images.cli("find", "crafted:crafted.raw/whole/loop")
        assert len(told.stdout.splitlines()) == 2
        assert "damaged: crafted.raw/whole/loop/inner/again" in told.stderr
        assert told.returncode == 1
        # what is restored is the guest's own link, and nothing is written through it
        out = images.scratch / "crafted"
        images.cli("restore", "crafted:crafted.raw/whole/loop", "crafted:crafted.raw/whole/away", out)
        assert os.readlink(out / "away") == "/etc/passwd"
        assert sorted(path.name for path in (out / "loop").iterdir()) == ["inner", "up"]
    image.unlink()


def test_a_directory_in_two_places_lets_no_link_out(images: Images) -> None:
    image = copied(images, "ext4", "twice.raw")
    deep = "/a" + "/d" * 20
    steps = [f"mkdir {deep[: 2 * number]}" for number in range(1, 22)]
    script = [*steps, f"symlink {deep}/x {'../' * 21}etc/passwd", "mkdir /z", f"ln {deep} /z/short"]
    subprocess.run(
        ["debugfs", "-w", "-f", "-", image], input="\n".join(script), text=True, check=True, capture_output=True
    )
    with taken(images, "twice", "twice.raw"), mounted(images, "twice") as directory:
        root = directory / "files" / "twice.raw" / "whole"
        out = images.scratch / "twice"
        subprocess.run(["cp", "-rL", root / "a", out], capture_output=True, check=False)
        subprocess.run(["cp", "-rL", root / "z", out / "z"], capture_output=True, check=False)
        assert Path("/etc/passwd").read_bytes() not in [path.read_bytes() for path in out.rglob("*") if path.is_file()]
        with pytest.raises(OSError) as refused:
            (root / "z" / "short" / "x").read_bytes()
        assert refused.value.errno == errno.EIO
        assert os.readlink(root / deep[1:] / "x") == "../" * 20 + "../etc/passwd"
    image.unlink()


def test_a_mount_gives_no_rights(images: Images) -> None:
    with taken(images, "rights", "ext4.raw"), mounted(images, "rights") as directory:
        table = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        ours = [line[3].split(",") for line in table if line[1].startswith(str(directory))]
        assert len(ours) == 2  # the mount, and the disk bound into it
        for options in ours:
            assert {"ro", "nosuid", "nodev", "noexec"} <= set(options)
        with pytest.raises(OSError, match="Read-only"):
            (directory / "files" / "new").write_text("x")
        root = directory / "files" / "ext4.raw" / "whole"
        nodes = [path for path in root.rglob("*.dev") if stat.S_ISBLK(path.lstat().st_mode)]
        assert nodes
        with pytest.raises(PermissionError):
            nodes[0].open("rb")
        for path in root.rglob("*.ln"):
            target = os.path.normpath(os.path.join(path.parent, os.readlink(path)))
            assert target.startswith(str(root))
        parsers = parsers_of(directory)
        assert parsers
        for process in parsers:
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert "Seccomp:\t2" in status
            assert "NoNewPrivs:\t1" in status
            assert "Uid:\t65534" in status


def test_a_restore_gives_no_rights_unless_told(images: Images) -> None:
    with taken(images, "rights", "ext4.raw"):
        for words, privileged in (((), False), (("--privileged",), True)):
            out = images.scratch / f"rights-{privileged}"
            told = images.json("restore", "rights:ext4.raw/whole", out, *words)
            assert told["problems"] == []
            assert (told["left_out"]["set_id_bits"] > 0) == (told["left_out"]["devices"] > 0) == (not privileged)
            modes = [path.lstat().st_mode for path in out.rglob("*")]
            assert any(stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID) for mode in modes) == privileged
            assert any(stat.S_ISBLK(mode) for mode in modes) == privileged


def test_a_parser_that_dies_costs_one_read_and_not_the_mount(images: Images) -> None:
    with taken(images, "dying", "ext4.raw"), mounted(images, "dying") as directory:
        tree = directory / "files" / "ext4.raw" / "whole"
        full = [path for path in tree.rglob("file*") if path.is_file() and path.stat().st_size]
        for process in parsers_of(directory):
            process.kill()
        got, failed = {}, []
        for path in full[:50]:
            try:
                got[path.relative_to(tree)] = path.read_bytes()
            except OSError as error:
                failed.append(error.errno)
        assert set(failed) <= {errno.EIO}
        assert len(failed) <= 1
        with kernel(images, "ext4") as mine:
            assert got == {path: (mine / path).read_bytes() for path in got}
