"""Small files are asked for several at a time and before they are opened, which readers notice by the speed only."""

import errno
import stat
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pyfuse3
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.files.parser import Parser
from clients.files.snapshot import FileTree
from clients.files.wire import Entry, Tree
from clients.mount.contents import Contents
from clients.mount.filesystem import SnapshotFilesystem
from clients.mount.listings import Listings
from clients.mount.tree import Directory, Inode, Node

TREE = FileTree(Parser([]), 0, Tree((0,), "whole", "ext4"), "")
DIRECTORY = 2
MIB = 1 << 20


class Asked:
    """A parser's answers: file N holds N as text, unless it is damaged. Notes what it was asked for."""

    def __init__(self, damaged: Iterable[int] = ()) -> None:
        self.requests: list[list[int]] = []
        self.damaged = set(damaged)
        self.answering = trio.Event()
        self.answering.set()

    async def __call__(self, tree: FileTree, decode: Callable[[Any], Any], call: str, *arguments: Any) -> Any:
        (numbers,) = arguments
        self.requests.append(numbers)
        await trio.lowlevel.checkpoint()
        await self.answering.wait()
        if numbers[0] in self.damaged:
            raise pyfuse3.FUSEError(errno.EIO)
        return [None if number in self.damaged else content_of(number) for number in numbers]


def content_of(number: int) -> bytes:
    return b"%d" % number


def file(number: int) -> Inode:
    size = len(content_of(number))
    entry = Entry(number, stat.S_IFREG | 0o644, 1, 0, 0, size, 4096, 0, 0, 0)
    return Inode(TREE, entry, 2, DIRECTORY)


def read_in(asked: Asked, files: list[Inode], order: list[int], readers: int = 1) -> list[bytes | int]:
    """Return what files in a directory of `files` contain, or the error, read in an order by so many at once."""
    found: list[bytes | int] = []

    async def read(contents: Contents, numbers: list[int]) -> None:
        for number in numbers:
            try:
                found.append(await contents.whole(file(number)))
            except pyfuse3.FUSEError as error:
                found.append(error.errno)
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        contents = Contents(asked)
        contents.listed(TREE, DIRECTORY, (one.entry for one in files), begin=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(contents.ahead)
            async with trio.open_nursery() as reading:
                for _ in range(readers):
                    reading.start_soon(read, contents, order)
            nursery.cancel_scope.cancel()

    trio.run(main)
    return found


def test_files_read_in_a_row_cost_few_questions_and_each_is_asked_for_once() -> None:
    asked = Asked()
    numbers = list(range(100, 600))
    assert read_in(asked, [file(number) for number in numbers], numbers) == [content_of(number) for number in numbers]
    assert sorted(number for request in asked.requests for number in request) == numbers
    assert len(asked.requests) < 20


def test_files_read_here_and_there_are_asked_for_alone() -> None:
    asked = Asked()
    files = [file(number) for number in range(100, 600)]
    read_in(asked, files, [150, 300, 200, 599, 101])
    assert asked.requests == [[150], [300], [200], [599], [101]]


def test_a_damaged_file_is_an_error_to_its_reader_only() -> None:
    for damaged in range(100, 140):
        asked = Asked([damaged])
        numbers = list(range(100, 140))
        found = read_in(asked, [file(number) for number in numbers], numbers)
        assert found == [errno.EIO if number == damaged else content_of(number) for number in numbers]


def test_two_readers_of_one_directory_get_the_same() -> None:
    numbers = list(range(100, 300))
    found = read_in(Asked(), [file(number) for number in numbers], numbers, readers=2)
    assert sorted(found, key=str) == sorted(2 * [content_of(number) for number in numbers])


def test_what_was_asked_for_ahead_is_waited_for_and_not_asked_for_again() -> None:
    asked = Asked()
    found: list[bytes] = []

    async def read(contents: Contents, number: int) -> None:
        found.append(await contents.whole(file(number)))

    async def main() -> None:
        contents = Contents(asked)
        contents.listed(TREE, DIRECTORY, (file(number).entry for number in range(100, 110)), begin=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(contents.ahead)
            await read(contents, 100)
            asked.answering = trio.Event()
            await read(contents, 101)  # whose turn it is to have more asked for
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(read, contents, 102)
            await trio.testing.wait_all_tasks_blocked()
            asked.answering.set()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert found == [b"100", b"101", b"102"]
    assert [number for request in asked.requests for number in request].count(102) == 1


@given(
    st.lists(st.tuples(st.integers(0, 4 * MIB), st.integers(1, MIB)), max_size=6),
    st.lists(st.tuples(st.integers(0, 9 * MIB), st.integers(1, MIB)), min_size=1, max_size=6),
)
@settings(deadline=None)
def test_holes_read_as_zeros_and_data_as_it_is(pieces: list[tuple[int, int]], reads: list[tuple[int, int]]) -> None:
    size = 8 * MIB
    content = bytearray(size)
    ranges: list[tuple[int, int]] = []
    end = 0
    for gap, length in pieces:
        begin = min(end + gap, size)
        end = min(begin + length, size)
        if begin < end:
            content[begin:end] = b"d" * (end - begin)
            ranges.append((begin, end - begin))
    asked: list[tuple[int, int]] = []

    async def ask(tree: FileTree, decode: Callable[[Any], Any], call: str, *arguments: Any) -> Any:
        if call == "data":
            return ranges
        _, offset, length = arguments
        asked.append((offset, length))
        return bytes(content[offset : offset + length])

    async def main() -> None:
        contents = Contents(ask)
        sparse = Inode(TREE, replace(file(7).entry, size_bytes=size, allocated_bytes=4096), 2, DIRECTORY)
        for offset, length in reads:
            assert await contents.part(sparse, offset, length) == content[offset : offset + length]

    trio.run(main)
    if not ranges:
        assert not asked


def test_a_file_whose_holes_cannot_be_told_is_read() -> None:
    async def ask(tree: FileTree, decode: Callable[[Any], Any], call: str, *arguments: Any) -> Any:
        if call == "data":
            raise pyfuse3.FUSEError(errno.EFBIG)
        return b"x" * arguments[2]

    async def main() -> None:
        sparse = Inode(TREE, replace(file(7).entry, size_bytes=8 * MIB, allocated_bytes=0), 2, DIRECTORY)
        assert await Contents(ask).part(sparse, MIB, 4096) == b"x" * 4096

    trio.run(main)


def test_a_directory_is_asked_for_once_and_what_is_kept_is_bounded() -> None:
    asked: list[tuple[int, int]] = []

    async def ask(tree: FileTree, decode: Callable[[Any], Any], call: str, *arguments: Any) -> Any:
        asked.append(arguments)
        return [(b"%d" % number, None) for number in range(1000)], False

    async def main() -> None:
        listings = Listings(ask)
        for _ in range(2):
            for position in range(0, 10_000, 1000):
                entries, _ = await listings.part(TREE, 2, position)
                assert len(entries) == 1000
        assert len(asked) == 10
        for directory in range(100):
            await listings.part(TREE, directory, 0)
        assert sum(len(entries) for entries, _ in listings._kept.values()) <= 20_000

    trio.run(main)


def test_a_fault_of_ours_is_an_error_of_one_request() -> None:
    def broken() -> dict[bytes, Node]:
        raise ZeroDivisionError

    async def main() -> None:
        root = SnapshotFilesystem(Directory(broken, 0))
        with pytest.raises(pyfuse3.FUSEError) as failed:
            await root.lookup(pyfuse3.ROOT_INODE, b"x")
        assert failed.value.errno == errno.EIO

    trio.run(main)
