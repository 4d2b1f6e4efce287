"""Partitions, logical volumes over several disks, encryption: each file system in them against the kernel's mount."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.images import Kind, described, make_image
from tests.lab.loops import attached
from tests.lab.volume_group import volume_group
from tests.mounting import MIB, Images, comparable, image_pool, kernel, mounted, taken

FILES = 5000
IMAGE_BYTES = 600 * MIB
PASSPHRASE = "correct horse"
# where each image went: volume and partition, as our mount shows them
PLACES: tuple[tuple[Kind, str], ...] = (
    ("ext4", "gpt.raw/p1"),
    ("xfs", "gpt.raw/p3"),
    ("ext4", "lvm0.raw/guest-linear"),
    ("xfs", "lvm1.raw/guest-striped"),
    ("ext3", "mbr.raw/p1"),
    ("vfat", "mbr.raw/p5"),
    ("ntfs", "mbr.raw/p6"),
    ("ext3", "luks.raw/whole"),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    with image_pool(tmp_path_factory.mktemp("disks"), "disks-pool", 16384 * MIB) as made:
        source = made.scratch
        for kind, size, files in (
            ("ext4", IMAGE_BYTES, FILES),
            ("xfs", IMAGE_BYTES, FILES),
            ("ext3", 300 * MIB, 200),
            ("vfat", 300 * MIB, 200),
            ("ntfs", 300 * MIB, 200),
        ):
            make_image(kind, made.pool / f"{kind}.plain", size, files)
        _gpt(made.pool / "gpt.raw", {1: made.pool / "ext4.plain", 3: made.pool / "xfs.plain"})
        _mbr(made.pool / "mbr.raw", [made.pool / f"{kind}.plain" for kind in ("ext3", "vfat", "ntfs")])
        _lvm(made.pool, made.pool / "ext4.plain", made.pool / "xfs.plain")
        key = source / "key"
        key.write_text(f"{PASSPHRASE}\n")
        _luks(made.pool, made.pool / "ext3.plain", source)
        for name, tool in (("btrfs.raw", "mkfs.btrfs"), ("exfat.raw", "mkfs.exfat")):
            with (made.pool / name).open("wb") as file:
                file.truncate(128 * MIB)
            subprocess.run([tool, made.pool / name], check=True, capture_output=True)
        with (made.pool / "md.raw").open("wb") as file:  # mdadm makes arrays through the kernel only, and ours cannot
            file.truncate(8 * MIB)
            file.seek(4096)
            file.write(bytes.fromhex("fc4e2ba9") + (1).to_bytes(4, "little"))
        yield made


VOLUMES = (
    "gpt.raw", "mbr.raw", "lvm0.raw", "lvm1.raw", "luks.raw", "luks2.raw", "btrfs.raw", "exfat.raw", "md.raw",
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(images: Images) -> Iterator[Path]:
    with taken(images, "disks", *VOLUMES), mounted(images, "disks", "--key-file", images.scratch / "key") as made:
        yield made


def _gpt(disk: Path, parts: dict[int, Path]) -> None:
    with disk.open("wb") as file:
        file.truncate(sum(part.stat().st_size for part in parts.values()) + 16 * MIB)
    begin = 1
    for number, part in parts.items():
        size = part.stat().st_size // MIB
        words = ["sgdisk", f"--new={number}:{begin}M:+{size}M", f"--change-name={number}:part {number}", disk]
        subprocess.run(words, check=True, capture_output=True)
        _copy(part, disk, begin * MIB)
        begin += size + 2


def _mbr(disk: Path, parts: list[Path]) -> None:
    """One primary partition, two logical ones."""
    with disk.open("wb") as file:
        file.truncate(sum(part.stat().st_size for part in parts) + 16 * MIB)
    sizes = [part.stat().st_size // 512 for part in parts]
    first, second, third = 2048, 2048 + sizes[0] + 4096, 2048 + sizes[0] + 8192 + sizes[1]
    script = f"label: dos\n{first},{sizes[0]},83\n{second - 2048},,5\n\n\n{second},{sizes[1]},c\n{third},{sizes[2]},7\n"
    subprocess.run(["sfdisk", "--quiet", disk], input=script, text=True, check=True)
    for part, begin in zip(parts, (first, second, third), strict=True):
        _copy(part, disk, begin * 512)


def _lvm(pool: Path, linear: Path, striped: Path) -> None:
    disks = [pool / f"lvm{number}.raw" for number in (0, 1)]
    for disk in disks:
        with disk.open("wb") as file:
            file.truncate((linear.stat().st_size + striped.stat().st_size) // 2 + 16 * MIB)
    with volume_group("guest", disks) as group:
        # the linear one does not fit on one disk beside the striped one
        group.create("striped", striped.stat().st_size, stripes=2)
        group.create("linear", linear.stat().st_size)
        group.write("striped", striped)
        group.write("linear", linear)


def _luks(pool: Path, plain: Path, scratch: Path) -> None:
    key = scratch / "passphrase"
    key.write_text(PASSPHRASE)
    secret = f"secret,id=key,file={key}"
    options = "key-secret=key,iter-time=100"
    size = str(plain.stat().st_size)
    make = ["qemu-img", "create", "-q", "-f", "luks", "--object", secret, "-o", options, pool / "luks.raw", size]
    subprocess.run(make, check=True)
    source, target = f"driver=raw,file.filename={plain}", f"driver=luks,key-secret=key,file.filename={pool}/luks.raw"
    fill = ["qemu-img", "convert", "-n", "--object", secret, "--image-opts", "--target-image-opts", source, target]
    subprocess.run(fill, check=True)
    subprocess.run(["cryptsetup", "isLuks", "--type", "luks1", pool / "luks.raw"], check=True)
    with (pool / "luks2.raw").open("wb") as file:
        file.truncate(32 * MIB)
    quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
    subprocess.run(
        ["cryptsetup", "--batch-mode", "luksFormat", "--type", "luks2", *quick, pool / "luks2.raw", key], check=True
    )


def _copy(part: Path, disk: Path, offset: int) -> None:
    words = ["dd", f"if={part}", f"of={disk}", "bs=1M", f"seek={offset}", "oflag=seek_bytes", "conv=notrunc,sparse"]
    subprocess.run(words, check=True, capture_output=True)


@pytest.mark.parametrize(("kind", "place"), PLACES)
def test_files_in_partitions_and_volumes_are_what_the_kernel_sees(
    images: Images, directory: Path, kind: Kind, place: str
) -> None:
    posix = kind in ("ext3", "ext4", "xfs")
    if kind == "vfat":  # whose driver the lab's kernel has not: mtools reads it
        out = images.scratch / "by-mtools"
        out.mkdir()
        subprocess.run(
            ["mcopy", "-s", "-n", "-i", images.pool / "vfat.plain", "::/*", out], check=True, capture_output=True
        )
        theirs = described(out, posix=False)
    else:
        with kernel(images, kind, images.pool / f"{kind}.plain") as mine:
            theirs = comparable(described(mine, posix=posix))
    ours = comparable(described(directory / "files" / place, posix=posix))
    assert ours.keys() == theirs.keys()
    assert {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]} == {}


def test_partitions_are_numbered_as_the_kernel_does(images: Images, directory: Path) -> None:
    for disk in ("gpt.raw", "mbr.raw"):
        with attached(images.pool / disk) as (device,):
            told = subprocess.run(["sfdisk", "--dump", device], check=True, capture_output=True, text=True).stdout
        numbers = {
            f"p{line.split(' ')[0].removeprefix(f'{device}p')}"
            for line in told.splitlines()
            if line.startswith(device) and "type=5" not in line
        }
        shown = {path.name for path in (directory / "files" / disk).iterdir() if path.is_dir()}
        assert shown == numbers


def test_a_volume_group_is_shown_on_each_of_its_disks(directory: Path) -> None:
    for disk in ("lvm0.raw", "lvm1.raw"):
        names = {path.name for path in (directory / "files" / disk).iterdir() if path.is_dir()}
        assert names == {"guest-linear", "guest-striped"}


def test_half_a_volume_group_says_what_is_missing(images: Images) -> None:
    with taken(images, "half", "lvm0.raw"), mounted(images, "half") as shown:
        (place,) = (shown / "files" / "lvm0.raw").iterdir()
        assert (
            "1 physical volumes of volume group guest are not in this snapshot" in (place / "WHY-NOT.txt").read_text()
        )


@pytest.mark.parametrize(
    ("volume", "hint"),
    [
        ("luks2.raw", "cryptsetup open --readonly"),
        ("btrfs.raw", "Btrfs"),
        ("exfat.raw", "exFAT"),
        ("md.raw", "mdadm --assemble --readonly"),
    ],
)
def test_what_no_library_reads_says_what_to_use_instead(directory: Path, volume: str, hint: str) -> None:
    why = (directory / "files" / volume / "whole" / "WHY-NOT.txt").read_text()
    assert hint in why
    assert "losetup" in why


def test_an_encrypted_disk_needs_its_key(images: Images, directory: Path) -> None:
    told = images.json("ls", "disks")
    why = {one["volume"]: one["why_not"] for one in told}
    assert "--key-file" in why["luks.raw"]
    wrong = images.scratch / "wrong"
    wrong.write_text("battery staple")
    told = images.json("ls", "disks", "--key-file", wrong)
    assert "does not open it" in {one["volume"]: one["why_not"] for one in told}["luks.raw"]
    assert images.cli("ls", "disks:luks.raw/whole").returncode == 1
    assert images.cli("ls", "disks", "--key-file", images.scratch / "none").returncode == 2
    assert PASSPHRASE not in images.cli("ls", "disks:luks.raw/whole", "--key-file", wrong).stderr
