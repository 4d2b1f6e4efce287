"""What of the storpool provider needs no cluster: tags, options, the bytes of a record."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from storpool import sptypes

from providers.base import PoolUnavailable, SnapshotNotFound
from providers.storpool import cutting, store, tags
from providers.storpool.objects import Found
from providers.storpool.options import StorPoolOptions, connection
from providers.storpool.store import Content, Detached

GROUPS = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
VOLUMES = st.one_of(
    st.from_regex(r"\A#?[A-Za-z0-9_\-.:]{1,198}\Z"), st.from_regex(r"\A~[a-z0-9]{1,8}\.[a-z0-9]{1,4}\.[a-z0-9]{1,12}\Z")
)


def valid(marks: dict[str, str]) -> bool:
    """Whether StorPool's own bindings take these tags."""
    return all(
        sptypes.VolumeTagName.handleVal(key) and sptypes.VolumeTagValue.handleVal(value) == value
        for key, value in marks.items()
    )


@given(GROUPS, VOLUMES, st.integers(0, 127))
def test_every_id_and_name_fits_into_tags_and_comes_back(group: str, volume: str, number: int) -> None:
    scope = tags.scope(StorPoolOptions(template="t" * 199))
    marks = tags.of_member(scope, group, "0" * 16, number, 128, volume, "abcd.b.xyz")
    assert valid(marks)
    assert (marks[tags.GROUP], tags.volume_in(marks), tags.number_in(marks)) == (group, volume, (number, 128))


@given(GROUPS)
def test_a_record_has_a_name_and_tags_that_storpool_can_have(group: str) -> None:
    then = datetime(2026, 11, 27, 12, 30, 1, 250, tzinfo=UTC)
    scope = tags.scope(StorPoolOptions(template="t", tag=f"{'k' * 60}={'v' * 60}"))
    marks = tags.of_record(scope, group, "0" * 16, then, tags.SETTLED)
    assert valid(marks)
    assert tags.cut_time_in(marks) == then
    name = tags.record_name(scope, group)
    assert sptypes.VolumeName.handleVal(name) == name


def test_pools_of_one_cluster_have_records_of_their_own() -> None:
    options = [
        StorPoolOptions(template="fast"),
        StorPoolOptions(template="slow"),
        StorPoolOptions(template="fast", name_prefix="one-"),
        StorPoolOptions(template="fast", tag="tenant=a"),
    ]
    assert len({tags.record_name(tags.scope(one), "g") for one in options}) == len(options)


def member(number: int, count: int, cut: str = "a") -> Found:
    marks = tags.of_member("s", "g", cut, number, count, f"v{number}", "x")
    return Found("snapshot", f"~{number}", f"{number}", 512, "t", "", marks)


@pytest.mark.parametrize(
    "members",
    [
        [],
        [member(0, 2)],
        [member(1, 2)],
        [member(0, 2), member(1, 3)],
        [member(0, 2), member(1, 2, "b")],
        [member(0, 1), member(0, 1, "b")],
    ],
)
def test_what_is_not_one_whole_cut_is_none(members: list[Found]) -> None:
    with pytest.raises(SnapshotNotFound):
        cutting.whole("g", members, None)


def test_a_whole_cut_comes_in_order_and_apart_from_others() -> None:
    found = cutting.whole("g", [member(1, 2), member(0, 2), member(0, 1, "late")], "a")
    assert [tags.volume_in(one.tags) for one in found] == ["v0", "v1"]


def test_the_options_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SP_AUTH_TOKEN", "SP_API_HTTP_HOST", "SP_API_HTTP_PORT"):
        monkeypatch.delenv(name, raising=False)
    conf, secret = tmp_path / "storpool.conf", tmp_path / "token"
    conf.write_text(
        "SP_AUTH_TOKEN=of-the-file\nSP_API_HTTP_HOST=10.0.0.1\n[host-a]\nSP_OURID=7\n[host-b]\nSP_OURID=8\n"
    )
    options = {"template": "t", "conf": conf, "conf_section": "host-b"}
    found = connection(StorPoolOptions(**options))
    assert (found.host, found.port, found.client_id) == ("10.0.0.1", 81, 8)
    assert found.token.get_secret_value() == "of-the-file"
    monkeypatch.setenv("SP_AUTH_TOKEN", "of-the-environment")
    monkeypatch.setenv("SP_API_HTTP_HOST", "10.0.0.2")
    found = connection(StorPoolOptions(**options))
    assert (found.host, found.token.get_secret_value()) == ("10.0.0.2", "of-the-environment")
    secret.write_text("of-its-own-file\n")
    found = connection(StorPoolOptions(**options, api_host="10.0.0.3", api_port=8081, token_file=secret, client_id=9))
    assert (found.host, found.port, found.client_id) == ("10.0.0.3", 8081, 9)
    assert found.token.get_secret_value() == "of-its-own-file"
    with pytest.raises(PoolUnavailable, match="token_file"):
        connection(StorPoolOptions(**options, token_file=tmp_path / "not-there"))


def test_a_token_is_never_shown() -> None:
    options = StorPoolOptions(template="t", token="se-cret")
    assert "se-cret" not in f"{options!r} {options} {options.model_dump()} {connection(options)!r}"
    with pytest.raises(ValidationError) as caught:
        StorPoolOptions(template="t", token="se-cret", token_file=Path("/x"))
    assert "se-cret" not in str(caught.value.errors(include_input=False))


def test_a_record_of_any_size_is_replaced_as_one(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.touch()
    os.truncate(device, 16 << 20)
    record = Found("volume", "frostgate.x", "a.b.c", 16 << 20, "t", "", {})
    contents = [Content(b"first"), Content(os.urandom(4 << 20), (Detached(volume_id="a.b.d", client=3, rights="rw"),))]
    with device.open("r+b", buffering=0) as file:
        for sequence, content in enumerate(contents, 1):
            store._write_slot(file.fileno(), sequence, content)
            assert store._latest(file.fileno(), record)[1] == content
        begin = (2 % 2) * store._SLOT_BYTES
        os.pwrite(file.fileno(), b"torn", begin + store._HEADER_BYTES + 100)
        assert store._latest(file.fileno(), record)[1] == contents[0]
        os.pwrite(file.fileno(), bytes(8192), store._SLOT_BYTES)
        with pytest.raises(SnapshotNotFound):
            store._latest(file.fileno(), record)
