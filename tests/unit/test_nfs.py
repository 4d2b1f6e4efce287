"""The nfs provider's parts: no way out of the root, no half manifest, formats as configured."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.base import InvalidName, PoolUnavailable, VolumeNotFound
from providers.nfs import beneath, copying, images, layout
from tests.lab.disk import allocated_ranges, sha256

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> int:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "root" / "out").symlink_to("..")
    (tmp_path / "root" / "good.raw").write_text("good")
    return os.open(tmp_path / "root", os.O_RDONLY)


@pytest.mark.parametrize(
    "path", ["../secret", "link", "out/secret", "/etc/passwd", "./../secret", "good.raw/../../secret"]
)
def test_no_path_leads_out_of_the_root(root: int, path: str) -> None:
    with pytest.raises(OSError, match=r"."):
        beneath.open_beneath(root, path, os.O_RDONLY)


@pytest.mark.parametrize("name", ["link", "out", "missing"])
def test_only_regular_files_are_volumes(root: int, name: str) -> None:
    with pytest.raises(VolumeNotFound):
        beneath.open_volume(root, name)


@given(st.text())
def test_a_volume_s_name_is_one_component_that_shows(name: str) -> None:
    if beneath.is_volume_name(name):
        assert os.path.basename(name) == name
        assert name not in ("", ".", "..")
        assert name.isprintable()


def test_a_manifest_that_is_not_whole_is_no_snapshot(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_RDONLY)
    (tmp_path / ".frostgate" / "g").mkdir(parents=True)
    for content in ("", "{", "[]", '{"group": "g"}', "null"):
        (tmp_path / ".frostgate" / "g" / layout.MANIFEST).write_text(content)
        with pytest.raises(Exception, match=r"manifest of snapshot g is damaged|no snapshot g"):
            layout.manifest(root, "g")
    os.close(root)


def test_a_copy_keeps_content_and_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "s", tmp_path / "t"
    with source.open("wb") as file:
        file.truncate(100 * MIB)
        for offset in (0, 33 * MIB, 99 * MIB):
            file.seek(offset)
            file.write(os.urandom(MIB))
    target.write_bytes(b"old" * MIB)
    copied: list[int] = []
    with source.open("rb") as reading, target.open("r+b") as writing:
        copying.copy(reading.fileno(), writing.fileno(), copied.append)
    assert sha256(source) == sha256(target)
    assert allocated_ranges(source) == allocated_ranges(target)
    assert sum(copied) == 3 * MIB


def test_formats_come_from_caller_suffix_and_pool_in_this_order() -> None:
    assert images.format_of("a.qcow2", "raw", "raw") == "raw"
    assert images.format_of("a.qcow2", None, "raw") == "qcow2"
    assert images.format_of("a.img", None, "qcow2") == "qcow2"
    assert images.format_of("0b1e", "", "raw") == "raw"
    with pytest.raises(InvalidName):
        images.format_of("a", "vmdk", "raw")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "writable"),
        (errno.EACCES, "no_root_squash"),
        (errno.EPERM, "no_root_squash"),
        (errno.ESTALE, "again"),
    ],
)
def test_what_a_server_refuses_is_said_with_what_to_do(number: int, advice: str) -> None:
    with pytest.raises(PoolUnavailable, match=advice), beneath.storage_errors(Path("/pool")):
        raise OSError(number, os.strerror(number), "a.raw")
