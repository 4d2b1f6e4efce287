"""What somebody else left or planted in `.frostgate` is neither believed nor followed, and can be removed."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from providers.base import GroupSpec, ProviderError, SnapshotExists, VolumeSpec
from providers.nfs.options import NfsOptions
from providers.nfs.provider import NfsProvider
from tests.lab.disk import sha256

MIB = 1 << 20
GROUP, VOLUME = "g", "a.raw"
SPEC = GroupSpec(GROUP, (VolumeSpec(VOLUME),))
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def ignored(_done: int, _total: int) -> None:
    pass


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    root = tmp_path / "pool"
    root.mkdir()
    (root / VOLUME).write_bytes(b"then" * MIB)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "outside").mkdir()
    return root


@pytest.fixture
def provider(pool: Path) -> Iterator[NfsProvider]:
    opened = NfsProvider("pool", NfsOptions(root=pool))
    yield opened
    opened.close()


@pytest.fixture
def manifest(provider: NfsProvider, pool: Path) -> Path:
    """That of a good snapshot; the volume was written to since."""
    provider.prepare(SPEC)
    provider.cut(GROUP)
    provider.settle(GROUP, NOW, b"record", ignored)
    (pool / VOLUME).write_bytes(b"now!" * MIB)
    return pool / ".frostgate" / GROUP / ".manifest.json"


def changed(**fields: Any) -> Callable[[dict[str, Any]], str]:
    return lambda whole: json.dumps({**whole, **fields})


def member(**fields: Any) -> Callable[[dict[str, Any]], str]:
    return lambda whole: json.dumps({**whole, "members": [{**whole["members"][0], **fields}]})


DAMAGE: dict[str, Callable[[dict[str, Any]], str]] = {
    "empty": lambda _: "",
    "truncated": lambda whole: json.dumps(whole)[:-20],
    "zeros, as after a power cut": lambda whole: "\0" * len(json.dumps(whole)),
    "no JSON": lambda _: "\udcff",
    "a list": lambda _: "[]",
    "nested deeply": lambda _: "[" * 100_000,
    "100 MB": lambda whole: json.dumps(whole) + " " * 100_000_000,
    "another group's": changed(group="h"),
    "no members": changed(members=[]),
    "a member twice": lambda whole: json.dumps({**whole, "members": whole["members"] * 2}),
    "a member with a path": member(volume="../secret"),
    "an absolute member": member(volume="/etc/passwd"),
    "a hidden member": member(volume=".cut.json"),
    "a size below zero": member(size_bytes=-1),
    "a size without end": member(size_bytes=1 << 70),
    "a size in words": member(size_bytes="many"),
    "an owner out of range": member(attributes={"uid": -1, "gid": 0, "mode": 0o600}),
    "a mode out of range": member(attributes={"uid": 0, "gid": 0, "mode": 0o170000}),
    "an attribute that is not a user's": member(
        attributes={"uid": 0, "gid": 0, "mode": 0o600, "xattrs": {"security.capability": "00"}}
    ),
    "an attribute that is no bytes": member(attributes={"uid": 0, "gid": 0, "mode": 0o600, "xattrs": {"user.x": "zz"}}),
    "a time without a zone": changed(cut_time="2026-01-01T00:00:00"),
    "a record of a wrong type": changed(record=7),
    "a backing file with a path": member(
        backing=[{"kept": "../../../secret", "format": "raw", "file_bytes": 6, "mtime_ns": 0}]
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_manifest_that_is_not_ours_is_no_snapshot_and_is_not_overwritten(
    provider: NfsProvider, pool: Path, manifest: Path, damage: str
) -> None:
    manifest.write_text(DAMAGE[damage](json.loads(manifest.read_text())), errors="surrogateescape")
    assert_it_is_refused_and_kept(provider, pool)


@pytest.mark.parametrize("kind", ["symlink", "FIFO", "directory"])
def test_a_manifest_that_is_no_file_is_no_snapshot(
    provider: NfsProvider, pool: Path, manifest: Path, kind: str
) -> None:
    content = manifest.read_text()
    manifest.unlink()
    if kind == "symlink":
        (pool.parent / "manifest").write_text(content)
        manifest.symlink_to(pool.parent / "manifest")
    elif kind == "FIFO":
        os.mkfifo(manifest)
    else:
        manifest.mkdir()
    assert_it_is_refused_and_kept(provider, pool)


def assert_it_is_refused_and_kept(provider: NfsProvider, pool: Path) -> None:
    member_file = pool / ".frostgate" / GROUP / VOLUME
    before = sha256(member_file)
    assert list(provider.snapshots()) == []
    for verb in (
        lambda: provider.open(GROUP, VOLUME),
        lambda: provider.describe(GROUP, b"other"),
        lambda: provider.clone(GROUP, VOLUME, "new.raw", ignored),
        lambda: provider.prepare_revert(GROUP, [VOLUME], ignored),
    ):
        with pytest.raises(ProviderError) as caught:
            verb()
        assert caught.value.reason == "SNAPSHOT_DAMAGED"
    with pytest.raises(SnapshotExists):
        provider.prepare(SPEC)
    provider.abort(GROUP)
    assert list(provider.leftovers()) == []
    assert sha256(member_file) == before  # an operator may still want it
    assert (pool / VOLUME).read_bytes() == b"now!" * MIB
    assert_deletable(provider, pool)


def assert_deletable(provider: NfsProvider, pool: Path) -> None:
    provider.delete(GROUP, ignored)
    assert sorted(path.name for path in pool.iterdir()) == [".frostgate", VOLUME]
    assert [path.name for path in (pool / ".frostgate").iterdir()] == [".lock"]
    assert (pool.parent / "secret").read_text() == "secret"
    assert list((pool.parent / "outside").iterdir()) == []


def test_a_member_that_is_a_symlink_or_a_fifo_is_not_read(provider: NfsProvider, pool: Path, manifest: Path) -> None:
    file = manifest.with_name(VOLUME)
    for plant in (lambda: file.symlink_to(pool.parent / "secret"), lambda: os.mkfifo(file)):
        file.unlink()
        plant()
        with pytest.raises(ProviderError):
            provider.open(GROUP, VOLUME)
        with pytest.raises(ProviderError):
            provider.prepare_revert(GROUP, [VOLUME], ignored)
        assert (pool / VOLUME).read_bytes() == b"now!" * MIB
    assert_deletable(provider, pool)


@pytest.mark.parametrize("content", ["", "{", '{"members": []}', '{"members": [{"volume": "../secret"}]}'])
def test_a_list_of_what_is_staged_that_is_not_ours_moves_nothing(
    provider: NfsProvider, pool: Path, manifest: Path, content: str
) -> None:
    provider.prepare_revert(GROUP, [VOLUME], ignored)
    manifest.with_name(".revert").joinpath(".staged.json").write_text(content)
    with pytest.raises(ProviderError) as caught:
        provider.revert(GROUP, [VOLUME], ignored)
    assert caught.value.reason == "SNAPSHOT_DAMAGED"
    assert (pool / VOLUME).read_bytes() == b"now!" * MIB
    provider.prepare_revert(GROUP, [VOLUME], ignored)
    provider.revert(GROUP, [VOLUME], ignored)
    assert (pool / VOLUME).read_bytes() == b"then" * MIB
    assert_deletable(provider, pool)


@pytest.mark.parametrize("name", [".staged.json", ".staged.json.new", ".manifest.json.new", ".cut.json.new"])
def test_a_symlink_in_the_way_of_what_is_written_is_not_followed(
    provider: NfsProvider, pool: Path, manifest: Path, name: str
) -> None:
    directory = manifest.parent
    if name.startswith(".staged"):
        directory = directory / ".revert"
        directory.mkdir()
    (directory / name).symlink_to(pool.parent / "secret")
    provider.describe(GROUP, b"other")
    provider.prepare_revert(GROUP, [VOLUME], ignored)
    provider.revert(GROUP, [VOLUME], ignored)
    assert (pool / VOLUME).read_bytes() == b"then" * MIB
    assert_deletable(provider, pool)


@pytest.mark.parametrize("kind", ["symlink", "file", "full directory"])
def test_what_lies_in_the_place_of_a_group_is_not_followed(provider: NfsProvider, pool: Path, kind: str) -> None:
    place = pool / ".frostgate" / GROUP
    place.parent.mkdir()
    if kind == "symlink":
        place.symlink_to(pool.parent / "outside")
    elif kind == "file":
        place.write_text("planted")
    else:
        (place / "a" / "b").mkdir(parents=True)
        (place / "a" / "link").symlink_to("/etc")
        (place / VOLUME).symlink_to(pool.parent / "secret")
    assert list(provider.snapshots()) == []
    provider.prepare(SPEC)
    provider.cut(GROUP)
    provider.settle(GROUP, NOW, b"", ignored)
    assert sha256(place / VOLUME) == sha256(pool / VOLUME)
    assert_deletable(provider, pool)


@pytest.mark.parametrize("place", [".frostgate", ".frostgate/.lock"])
def test_a_symlink_in_the_place_of_our_directory_or_lock_is_refused_in_words(
    provider: NfsProvider, pool: Path, place: str
) -> None:
    (pool / place).parent.mkdir(exist_ok=True)
    (pool / place).symlink_to(pool.parent / ("outside" if place == ".frostgate" else "secret"))
    with pytest.raises(ProviderError, match=r"\.frostgate|\.lock") as caught:
        provider.prepare(SPEC)
    assert caught.value.reason == "POOL_UNAVAILABLE"
    assert "remove it" in caught.value.message
    (pool / place).unlink()
    provider.prepare(SPEC)
    provider.abort(GROUP)
    assert_deletable(provider, pool)


def test_a_cut_record_that_is_not_ours_is_a_lost_cut(provider: NfsProvider, pool: Path) -> None:
    for content in ("", "{}", '{"members": [{"volume": "../x"}], "boot": ""}', "[" * 100_000):
        provider.prepare(SPEC)
        provider.cut(GROUP)
        provider.close()
        (pool / ".frostgate" / GROUP / ".cut.json").write_text(content)
        again = NfsProvider("pool", NfsOptions(root=pool))
        with pytest.raises(ProviderError) as caught:
            again.settle(GROUP, NOW, b"", ignored)
        assert caught.value.reason == "VOLUME_CHANGED"
        again.abort(GROUP)
        assert_deletable(again, pool)
        again.close()
        provider = NfsProvider("pool", NfsOptions(root=pool))
    provider.close()
