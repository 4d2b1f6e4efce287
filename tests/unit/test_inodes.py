"""Inode numbers of a mount: what the kernel was told stays true, whether it is kept or asked for again."""

import errno
import gc
import stat
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyfuse3
import pytest
import trio

from clients.files.parser import Parser
from clients.files.snapshot import FileTree
from clients.files.wire import Entry, Tree
from clients.mount.inodes import Inodes
from clients.mount.tree import Directory, Inode

FILE = Entry(12, stat.S_IFREG | 0o640, 1, 1000, 1000, 5, 4096, 1, 2, 3)
LINK = replace(FILE, id=13, mode=stat.S_IFLNK | 0o777)
DIRECTORY = replace(FILE, id=14, mode=stat.S_IFDIR | 0o755)
ROOT = Directory(dict, 0)


class Asked:
    """A parser that knows entries by their numbers."""

    def __init__(self, *entries: Entry) -> None:
        self.entries = {entry.id: entry for entry in entries}
        self.requests: list[int] = []

    async def __call__(self, tree: FileTree, decode: Callable[[Any], Any], call: str, *arguments: Any) -> Any:
        assert call == "entry"
        self.requests.append(arguments[0])
        return self.entries[arguments[0]]


def tree() -> FileTree:
    return FileTree(Parser([]), 0, Tree((0,), "whole", "ext"), "")


def error_of(inodes: Inodes, number: int) -> int:
    with pytest.raises(pyfuse3.FUSEError) as failed:
        trio.run(inodes.node, number)
    return int(failed.value.errno)


def test_very_many_files_are_told_of_rightly_and_few_are_kept() -> None:
    files = [replace(FILE, id=number, size_bytes=number) for number in range(100, 60_100)]
    asked = Asked(*files)
    inodes = Inodes(ROOT, asked)
    one = tree()
    numbers = [inodes.number(2, b"x", Inode(one, entry, 3, 2)) for entry in files]
    assert len(set(numbers)) == len(files)
    assert len(inodes._files) <= 20_000
    for position in (0, 1, 30_000, -1):
        node = trio.run(inodes.node, numbers[position])
        assert isinstance(node, Inode)
        assert node.entry == files[position]
    assert asked.requests == [100, 101, 30_100]


def test_hard_links_share_a_number_and_symbolic_links_in_other_directories_do_not() -> None:
    inodes = Inodes(ROOT, Asked())
    one = tree()
    for entry, numbers in ((FILE, 1), (LINK, 2)):
        found = {
            inodes.number(parent, name, Inode(one, entry, 3, parent))
            for parent, name in ((5, b"a"), (6, b"b"), (5, b"c"))
        }
        assert len(found) == numbers


def test_a_directory_has_one_place() -> None:
    inodes = Inodes(ROOT, Asked())
    one = tree()
    number = inodes.number(5, b"a", Inode(one, DIRECTORY, 3, 20))
    assert inodes.number(5, b"a", Inode(one, DIRECTORY, 3, 20)) == number
    with pytest.raises(pyfuse3.FUSEError) as failed:
        inodes.number(6, b"b", Inode(one, DIRECTORY, 4, 21))
    assert failed.value.errno == errno.EIO


def test_trees_do_not_share_numbers() -> None:
    inodes = Inodes(ROOT, Asked())
    first, second = tree(), tree()
    for entry in (FILE, LINK, DIRECTORY):
        assert inodes.number(2, b"x", Inode(first, entry, 3)) != inodes.number(2, b"x", Inode(second, entry, 3))


def test_a_file_of_a_snapshot_that_is_gone_is_stale() -> None:
    inodes = Inodes(ROOT, Asked(FILE))
    gone = tree()
    number = inodes.number(2, b"x", Inode(gone, FILE, 3))
    inodes.forget(number)
    assert trio.run(inodes.node, number)
    inodes.forget(number)
    del gone
    gc.collect()
    assert error_of(inodes, number) == errno.ESTALE


def test_what_the_kernel_forgets_is_forgotten_when_it_was_told_no_more() -> None:
    inodes = Inodes(ROOT, Asked())
    number = inodes.number(2, b"x", Inode(tree(), DIRECTORY, 3))
    inodes.told(number)
    inodes.told(number)
    inodes.forget(number, 1)
    assert inodes.kept(number).node
    inodes.forget(number, 1)
    assert error_of(inodes, number) == errno.ESTALE
    inodes.forget(pyfuse3.ROOT_INODE, 5)
    assert trio.run(inodes.node, pyfuse3.ROOT_INODE) is ROOT


@pytest.mark.parametrize("answer", [DIRECTORY, LINK, replace(FILE, id=1 << 60), replace(FILE, id=99)])
def test_a_parser_that_contradicts_itself_is_not_believed(answer: Entry) -> None:
    asked = Asked()
    asked.entries[FILE.id] = answer
    inodes = Inodes(ROOT, asked)
    one = tree()
    number = inodes.number(2, b"x", Inode(one, FILE, 3))
    inodes.forget(number)
    assert error_of(inodes, number) == errno.ESTALE


def test_ids_too_large_to_be_in_a_number_are_numbered_nevertheless() -> None:
    inodes = Inodes(ROOT, Asked())
    one = tree()
    large = [replace(FILE, id=(1 << 62) + number) for number in range(3)]
    numbers = [inodes.number(2, b"x", Inode(one, entry, 3)) for entry in large]
    assert len(set(numbers)) == 3
    assert all(0 < number < 1 << 63 for number in numbers)
    node = trio.run(inodes.node, numbers[1])
    assert isinstance(node, Inode)
    assert node.entry == large[1]
