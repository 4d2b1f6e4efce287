"""Inode numbers, and what they stand for.

The kernel may hold very many files, and forgets them only when it needs the memory. So the number of a guest's file
says where it is, and only the last ones are kept: the parser tells of the others again. Directories, links and what is
ours is kept until the kernel forgets it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import pyfuse3
import structlog

from clients.files import wire
from clients.files.snapshot import FileTree
from clients.mount.tree import Directory, Inode, Node

_log = structlog.get_logger()

_FILE_BITS = 48
_MOST_TREES = 1 << 15
_FILES_KEPT = 20_000


@dataclass(slots=True)
class Known:
    """An inode that is kept; `lookups` is how often the kernel was told of it, `entries` what is in a directory."""

    node: Node
    key: object
    lookups: int = 0
    entries: Mapping[bytes, Node] | None = None
    read_at: float = 0.0


class Inodes:
    """The inodes of one mount. For one thread."""

    def __init__(self, root: Directory, ask: Callable[..., Awaitable[Any]]) -> None:
        """Take the root, and how to ask: `ask(tree, decode, call, ...)`."""
        self._ask = ask
        self._known: dict[int, Known] = {pyfuse3.ROOT_INODE: Known(root, "root", lookups=1)}
        self._numbers: dict[object, int] = {"root": pyfuse3.ROOT_INODE}
        self._next = pyfuse3.ROOT_INODE + 1
        self._trees: WeakValueDictionary[int, FileTree] = WeakValueDictionary()
        self._files: OrderedDict[int, Inode] = OrderedDict()

    def number(self, parent: int, name: bytes, node: Node) -> int:
        """Return a node's number: hard links share one; symbolic links, whose targets depend on it, do not.

        Raises FUSEError EIO for a directory that lies in two places: links in it would lead to two places as well,
        one of them outside the tree.
        """
        key: object
        if isinstance(node, Inode):
            tree, entry = node.tree, node.entry
            if _says_where(tree, entry):
                number = (tree.serial + 1) << _FILE_BITS | entry.id
                if tree.serial not in self._trees:
                    self._trees[tree.serial] = tree
                self._keep(number, node)
                return number
            key = (tree.serial, entry.id, node.parent if stat.S_ISLNK(entry.mode) else None)
        else:
            key = (parent, name, node.identity if isinstance(node, Directory) else None)
        found = self._numbers.get(key)
        if found is not None and isinstance(node, Inode):
            before = self._known[found].node
            if not isinstance(before, Inode) or before.parent != node.parent:
                _log.warning("directory_twice", partition=node.tree.tree.name, name=os.fsdecode(name))
                raise pyfuse3.FUSEError(errno.EIO)
        if found is None:
            found = self._next
            self._next += 1
            self._numbers[key] = found
            self._known[found] = Known(node, key)
        return found

    def told(self, number: int) -> None:
        """Note that the kernel was told of a number once more."""
        if known := self._known.get(number):
            known.lookups += 1

    def forget(self, number: int, count: int = 0) -> None:
        """Let go of a number that the kernel was told `count` times less."""
        self._files.pop(number, None)
        known = self._known.get(number)
        if known is None:
            return
        known.lookups -= count
        if known.lookups <= 0 and number != pyfuse3.ROOT_INODE:
            del self._known[number]
            self._numbers.pop(known.key, None)

    def kept(self, number: int) -> Known:
        """Return what is kept of a directory, a link or what is ours. Raises FUSEError ESTALE."""
        try:
            return self._known[number]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    async def node(self, number: int) -> Node:
        """Return what a number stands for. Raises FUSEError, also ESTALE when its snapshot was deleted."""
        if number < 1 << _FILE_BITS:
            return self.kept(number).node
        found = self._files.get(number)
        if found is None:
            serial, inode = (number >> _FILE_BITS) - 1, number & ((1 << _FILE_BITS) - 1)
            tree = self._trees.get(serial)
            if tree is None:
                raise pyfuse3.FUSEError(errno.ESTALE)
            entry = await self._ask(tree, wire.entry, "entry", inode)
            if entry.id != inode or not _says_where(tree, entry):
                raise pyfuse3.FUSEError(errno.ESTALE)  # the parser contradicts itself
            # of a file nobody needs its depth; where it lies helps to read ahead only
            found = Inode(tree, entry, 0)
        self._keep(number, found)
        return found

    def _keep(self, number: int, node: Inode) -> None:
        self._files[number] = node
        self._files.move_to_end(number)
        if len(self._files) > _FILES_KEPT:
            self._files.popitem(last=False)


def _says_where(tree: FileTree, entry: wire.Entry) -> bool:
    """Tell whether an entry gets a number that says where it is."""
    small = 0 <= entry.id < 1 << _FILE_BITS and tree.serial + 1 < _MOST_TREES
    return small and not stat.S_ISDIR(entry.mode) and not stat.S_ISLNK(entry.mode)
