"""Contents of guests' files, asked for more at a time than the kernel wants: each question costs a hop to a parser.

Who reads one file after the other in a directory (tar, cp, rsync) gets the next small ones with the one that he
opens; who reads a file from one end to the other gets the next megabyte of it. What was asked for and never used is
bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from clients.files import wire
from clients.files.parser import contents
from clients.files.snapshot import FileTree
from clients.files.wire import Entry
from clients.mount.tree import Inode, is_file
from clients.mount.waiting import waiting

SMALL_BYTES = 128 * 1024
_TOGETHER_BYTES = 1024 * 1024
_MOST_TOGETHER = 64
_KEPT_BYTES = 8 * 1024 * 1024
_DIRECTORIES = 64
_READERS = 16
_AHEAD_BYTES = 1024 * 1024

Key = tuple[int, int]
Ask = Callable[..., Awaitable[Any]]


@dataclass
class _Listed:
    """The small files of a directory in the order in which it was read; `in_a_row` were opened there last."""

    sizes: dict[int, int] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    in_a_row: int = 0


@dataclass
class _Reader:
    """What was read last of a file."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    begin: int = 0
    content: bytes = b""


class Contents:
    """What is read of the files in guests' trees. For one thread; `ask(tree, decode, call, ...)` asks a parser."""

    def __init__(self, ask: Ask) -> None:
        """Take how to ask."""
        self._ask = ask
        self._directories: OrderedDict[Key, _Listed] = OrderedDict()
        self._last: Key | None = None
        self._kept: OrderedDict[Key, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._readers: OrderedDict[Key, _Reader] = OrderedDict()

    def listed(self, tree: FileTree, directory: int, entries: Iterable[Entry | None], *, begin: bool) -> None:
        """Take note of a directory's entries as they are read; `begin` says that these are its first."""
        key = (id(tree), directory)
        if begin or key not in self._directories:
            self._directories[key] = _Listed()
            self._directories.move_to_end(key)
            if len(self._directories) > _DIRECTORIES:
                self._directories.popitem(last=False)
        listed = self._directories[key]
        for entry in entries:
            if entry and is_small(entry) and entry.id not in listed.places:
                listed.places[entry.id] = len(listed.order)
                listed.order.append(entry.id)
                listed.sizes[entry.id] = entry.size_bytes

    async def whole(self, node: Inode) -> bytes:
        """Return a small file's content. Raises what `ask` raises."""
        key = (id(node.tree), node.entry.id)
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._kept_bytes -= len(kept)
            return kept
        wanted = [node.entry.id, *self._next(node)]
        first, *others = await self._ask(node.tree, contents, "contents", wanted)
        for number, other in zip(wanted[1:], others, strict=False):
            if other is not None:
                self._keep((id(node.tree), number), other)
        return first or b""

    async def part(self, node: Inode, offset: int, length: int) -> bytes:
        """Return bytes of a file. Raises what `ask` raises."""
        key = (id(node.tree), node.entry.id)
        reader = self._readers.setdefault(key, _Reader())
        self._readers.move_to_end(key)
        if len(self._readers) > _READERS:
            self._readers.popitem(last=False)
        # the kernel asks for the next part before it has this one
        await waiting.turn(reader.lock)
        try:
            end = reader.begin + len(reader.content)
            if not (reader.begin <= offset and (offset + length <= end or offset < end == node.entry.size_bytes)):
                goes_on = reader.content and reader.begin <= offset <= end
                wanted = max(length, _AHEAD_BYTES) if goes_on else length
                decode = partial(wire.content, most_bytes=wanted)
                reader.content = await self._ask(node.tree, decode, "read", node.entry.id, offset, wanted)
                reader.begin = offset
            return reader.content[offset - reader.begin : offset - reader.begin + length]
        finally:
            reader.lock.release()

    def _next(self, node: Inode) -> list[int]:
        """Return the files to ask for together with one: the more, the more were opened in its directory before."""
        key = (id(node.tree), node.parent)
        listed = self._directories.get(key)
        if listed is None or node.entry.id not in listed.places:
            return []
        listed.in_a_row = min(_MOST_TOGETHER, listed.in_a_row * 4 + 1) if key == self._last else 0
        self._last = key
        listed.sent.add(node.entry.id)
        chosen: list[int] = []
        together = node.entry.size_bytes
        place = listed.places[node.entry.id] + 1
        while len(chosen) < listed.in_a_row and place < len(listed.order):
            number = listed.order[place]
            place += 1
            if number in listed.sent:
                continue
            together += listed.sizes[number]
            if together > _TOGETHER_BYTES:
                break
            chosen.append(number)
            listed.sent.add(number)
        return chosen

    def _keep(self, key: Key, content: bytes) -> None:
        self._kept_bytes += len(content) - len(self._kept.pop(key, b""))
        self._kept[key] = content
        while self._kept_bytes > _KEPT_BYTES:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped)


def is_small(entry: Entry) -> bool:
    """Tell whether an entry is a file that is read as a whole."""
    return is_file(entry) and 0 < entry.size_bytes <= SMALL_BYTES
