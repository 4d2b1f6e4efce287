"""One file's content: resumed at any size, by what any parser says of its holes, and by one restore at a time."""

import errno
import fcntl
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.files import wire
from clients.files.wire import Entry
from clients.restore import contents
from clients.restore.contents import Source, difference, forget_partials, partials, write

STRETCH = 16 * 1024
SIZE = 200_000
CONTENT = random.Random(5).randbytes(50_000) + bytes(100_000) + random.Random(6).randbytes(50_000)
DATA = [(0, 50_000), (150_000, 50_000)]


class Parser:
    """Reads CONTENT; `found` is what it says of holes."""

    def __init__(self, found: list[tuple[int, int]] | None) -> None:
        self.found = found
        self.read_bytes = 0

    def data(self, tree: int, number: int) -> list[tuple[int, int]]:
        if self.found is None:
            raise OSError(errno.EFBIG, "too many")
        return self.found

    def read(self, tree: int, number: int, offset: int, length: int) -> bytes:
        assert 0 <= offset < SIZE
        assert 0 < length <= SIZE - offset
        self.read_bytes += length
        return CONTENT[offset : offset + length]


def source(found: list[tuple[int, int]] | None = None, number: int = 12) -> Source:
    entry = Entry(number, 0o100644, 1, 0, 0, SIZE, 100_000, 7, 7, 7)
    return Source(SimpleNamespace(parser=Parser(found), number=0), entry, b"origin")  # type: ignore[arg-type]


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(contents, "_SYNC_BYTES", STRETCH)
    monkeypatch.setattr(contents, "_READ_BYTES", 4096)
    monkeypatch.setattr(wire, "_HOLES_BYTES", 4096)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def restored(file: Source, parent: int, directory: Path) -> tuple[bytes, int]:
    """Return what was written, and the bytes that were told to be done."""
    told: list[int] = []
    write(file, parent, b"name", lambda _: None, told.append)
    assert difference(file, parent, b"name") == ""
    assert os.listdir(directory) == ["name"]
    return (directory / "name").read_bytes(), sum(told)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, SIZE), holes=st.booleans())
def test_what_was_written_of_it_is_gone_on_with(parent: int, tmp_path: Path, length: int, holes: bool) -> None:
    file = source(DATA if holes else None)
    partial = tmp_path / os.fsdecode(file.partial(b"name"))
    partial.write_bytes(CONTENT[:length])
    partial.chmod(0o600)
    assert restored(file, parent, tmp_path) == (CONTENT, SIZE)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(st.tuples(st.integers(-(1 << 70), 1 << 70), st.integers(-(1 << 70), 1 << 70)), max_size=9))
def test_no_answer_of_a_parser_makes_it_read_elsewhere_or_twice(parent: int, found: list[tuple[int, int]]) -> None:
    file = source(found)
    end = 0
    for offset, part in file.read():
        assert offset >= end
        end = offset + len(part)
    assert end <= SIZE
    # what is data is read whatever else is said
    file = source([*DATA, *((at, length) for at, length in found if length > 0)])
    read = bytearray(SIZE)
    for offset, part in file.read():
        read[offset : offset + len(part)] = part
    assert read == CONTENT


def test_holes_are_not_read(parent: int, tmp_path: Path) -> None:
    file = source(DATA)
    assert restored(file, parent, tmp_path) == (CONTENT, SIZE)
    assert file.tree.parser.read_bytes == 2 * 100_000  # type: ignore[attr-defined]  # written, and compared


def test_a_difference_is_found_in_data_in_holes_and_in_the_size(parent: int, tmp_path: Path) -> None:
    file = source(DATA)
    for change, said in (
        ({60_000: b"x"}, "near byte 150000"),
        ({3: b"\0\0\0\0"}, "near byte 0"),
        ({SIZE - 1: b"\0"}, "near byte"),
        ({SIZE: b"x"}, "another size"),
    ):
        restored(file, parent, tmp_path)
        with (tmp_path / "name").open("r+b") as changed:
            for place, content in change.items():
                changed.seek(place)
                changed.write(content)
        assert said in difference(file, parent, b"name")


def test_only_what_was_left_of_other_files_of_the_name_is_forgotten(parent: int, tmp_path: Path) -> None:
    mine, other = source().partial(b"name"), source(number=13).partial(b"name")
    longer = source().partial(b"name.longer")
    for name in (mine, other, longer, b".name.mine.frostgate-partial", b".name.frostgate-partial"):
        (tmp_path / os.fsdecode(name)).touch()
    forget_partials(parent, partials(parent), b"name", source())
    assert os.fsdecode(other) not in os.listdir(tmp_path)
    assert len(os.listdir(tmp_path)) == 4


def test_two_restores_do_not_write_one_file(parent: int, tmp_path: Path) -> None:
    file = source()
    with (tmp_path / os.fsdecode(file.partial(b"name"))).open("wb") as theirs:
        os.fchmod(theirs.fileno(), 0o600)
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another restore writes it now"):
            write(file, parent, b"name", lambda _: None, lambda _: None)


@pytest.mark.parametrize("planted", ["link", "fifo", "shared"])
def test_what_others_put_in_its_place_is_not_written_to(parent: int, tmp_path: Path, planted: str) -> None:
    file = source()
    partial, victim = tmp_path / os.fsdecode(file.partial(b"name")), tmp_path.parent / f"victim of {planted}"
    victim.write_bytes(b"victim")
    if planted == "link":
        partial.symlink_to(victim)
    elif planted == "fifo":
        os.mkfifo(partial, 0o600)
    else:
        os.link(victim, partial)
    assert restored(file, parent, tmp_path) == (CONTENT, SIZE)
    assert victim.read_bytes() == b"victim"
