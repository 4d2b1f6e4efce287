"""Contents of guests' files, asked for more at a time than the kernel wants: each question costs a hop to a parser.

Who reads one file after the other in a directory (tar, cp, rsync) gets the next small ones with the one that he
opens, and while he reads those the ones after them are asked for; who reads a file from one end to the other gets the
next megabyte of it. What was asked for and never used is bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyfuse3
import structlog
import trio

from clients.files import wire
from clients.files.parser import contents, ranges
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
_DATA_RANGES = 10_000
_ZEROS = bytes(1024 * 1024)

_log = structlog.get_logger()

Key = tuple[int, int]
Ask = Callable[..., Awaitable[Any]]


@dataclass
class _Listed:
    """The small files of a directory in the order in which it was read.

    `wanted` of them are worth asking for at once, the more, the more were opened one after the other. `turn` is the
    one at which those that follow are asked for ahead, `opened` the place of the one that was opened last.
    """

    tree: FileTree
    sizes: dict[int, int] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    wanted: int = 0
    opened: int = -1
    turn: int | None = None


@dataclass
class _Reader:
    """What was read last of a file, and, once that is known, where it has data: all of it, where holes are few."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    begin: int = 0
    content: bytes = b""
    data: list[tuple[int, int]] | None = None


class Contents:
    """What is read of the files in guests' trees. For one thread; `ask(tree, decode, call, ...)` asks a parser."""

    def __init__(self, ask: Ask) -> None:
        """Take how to ask."""
        self._ask = ask
        self._directories: OrderedDict[Key, _Listed] = OrderedDict()
        self._kept: OrderedDict[Key, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._coming: dict[Key, trio.Event] = {}
        self._wanted = 0
        self._turns, self._turned = trio.open_memory_channel[_Listed](_DIRECTORIES)
        self._readers: OrderedDict[Key, _Reader] = OrderedDict()

    def listed(self, tree: FileTree, directory: int, entries: Iterable[Entry | None], *, begin: bool) -> None:
        """Take note of a directory's entries as they are read; `begin` says that these are its first."""
        key = (tree.serial, directory)
        if begin or key not in self._directories:
            # who read the files of one directory and now reads the next one is likely to read its files too
            self._directories[key] = _Listed(tree, wanted=self._wanted)
            self._wanted = 0
            self._directories.move_to_end(key)
            if len(self._directories) > _DIRECTORIES:
                self._directories.popitem(last=False)
        listed = self._directories[key]
        for entry in entries:
            if entry and is_small(entry) and entry.id not in listed.places:
                listed.places[entry.id] = len(listed.order)
                listed.order.append(entry.id)
                listed.sizes[entry.id] = entry.size_bytes
        if listed.wanted and listed.opened < 0:
            self._ask_ahead(listed)

    async def ahead(self) -> None:
        """Ask for files before they are opened, for as long as the mount is there."""
        async for listed in self._turned:
            chosen = self._next(listed, listed.opened + 1, 0)
            if chosen:
                try:
                    await self._fetch(listed, chosen)
                except pyfuse3.FUSEError:
                    pass  # it is in the log; who opens one of them asks again, and is told
                except Exception:  # the task's edge; what leaves it ends the mount
                    _log.exception("fault", request="ahead")

    async def whole(self, node: Inode) -> bytes:
        """Return a small file's content. Raises what `ask` raises."""
        number = node.entry.id
        key = (node.tree.serial, number)
        listed = self._directories.get((node.tree.serial, node.parent))
        if listed and number not in listed.places:
            listed = None
        if listed:
            self._opened(listed, number)
        coming = self._coming.get(key)
        if coming is not None:
            with waiting.elsewhere():
                await coming.wait()
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._kept_bytes -= len(kept)
            return kept
        if listed is None:
            (content,) = await self._ask(node.tree, contents, "contents", [number])
            return content or b""
        listed.sent.add(number)
        following = self._next(listed, listed.places[number] + 1, node.entry.size_bytes)
        return await self._fetch(listed, [number, *following], now=True) or b""

    async def part(self, node: Inode, offset: int, length: int) -> bytes:
        """Return bytes of a file. Raises what `ask` raises."""
        key = (node.tree.serial, node.entry.id)
        reader = self._readers.setdefault(key, _Reader())
        self._readers.move_to_end(key)
        if len(self._readers) > _READERS:
            self._readers.popitem(last=False)
        # the kernel asks for the next part before it has this one
        await waiting.turn(reader.lock)
        try:
            if reader.data is None:
                reader.data = await self._data(node)
            if (length := min(length, node.entry.size_bytes - offset)) <= 0:
                return b""
            if length <= len(_ZEROS) and _is_hole(reader.data, offset, length):
                return _ZEROS[:length]
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

    async def _data(self, node: Inode) -> list[tuple[int, int]]:
        """Return where a file has data, sorted: zeros that are known need no asking."""
        if node.entry.sparse:
            with suppress(pyfuse3.FUSEError):  # too many, or damaged: what is read tells
                found: list[tuple[int, int]] = await self._ask(node.tree, ranges, "data", node.entry.id)
                if len(found) <= _DATA_RANGES:
                    return sorted(found)
        return [(0, node.entry.size_bytes)]

    def _opened(self, listed: _Listed, number: int) -> None:
        """Note that a file is opened; have the next ones asked for when it is their turn."""
        place = listed.places[number]
        if place == listed.opened + 1:
            listed.wanted = min(_MOST_TOGETHER, listed.wanted * 4 + 1)
        elif place != listed.opened:
            listed.wanted = 0
        listed.opened = place
        self._wanted = listed.wanted
        if number == listed.turn:
            listed.turn = None
            self._ask_ahead(listed)

    def _ask_ahead(self, listed: _Listed) -> None:
        with suppress(trio.WouldBlock):  # they are asked for when they are opened
            self._turns.send_nowait(listed)

    async def _fetch(self, listed: _Listed, numbers: list[int], *, now: bool = False) -> bytes | None:
        """Ask for files and keep them; `now`: the first is not kept but returned. Raises what `ask` raises."""
        keys = [(listed.tree.serial, number) for number in numbers]
        come = trio.Event()
        self._coming.update(dict.fromkeys(keys, come))
        listed.turn = numbers[len(numbers) // 2] if len(numbers) > 1 else None
        try:
            found: list[bytes | None] = await self._ask(listed.tree, contents, "contents", numbers)
            for key, content in list(zip(keys, found, strict=False))[now:]:
                if content is not None:
                    self._keep(key, content)
        finally:
            for key in keys:
                self._coming.pop(key, None)
            come.set()
        return found[0]

    def _next(self, listed: _Listed, place: int, together: int) -> list[int]:
        """Return files from a place on that are worth asking for, beside `together` bytes."""
        chosen: list[int] = []
        while len(chosen) < listed.wanted and place < len(listed.order):
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


def _is_hole(data: list[tuple[int, int]], offset: int, length: int) -> bool:
    """Tell whether a range has no data; `data` is sorted."""
    place = bisect_left(data, (offset + length, 0))
    # what begins before the range's end is data of it, unless it ends before its begin
    return not place or data[place - 1][0] + data[place - 1][1] <= offset


def is_small(entry: Entry) -> bool:
    """Tell whether an entry is a file that is read as a whole."""
    return is_file(entry) and 0 < entry.size_bytes <= SMALL_BYTES
