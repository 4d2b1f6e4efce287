"""Listings of guests' directories, kept for who reads them again: `find` before `tar`, `du` before `cp`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from clients.files.parser import listed
from clients.files.snapshot import FileTree
from clients.files.wire import Entry

_KEPT_ENTRIES = 20_000

Listing = tuple[list[tuple[bytes, Entry | None]], bool]


class Listings:
    """Parts of directories as parsers told them, a bounded number of entries. For one thread."""

    def __init__(self, ask: Callable[..., Awaitable[Any]]) -> None:
        """Take how to ask: `ask(tree, decode, call, ...)`."""
        self._ask = ask
        self._kept: OrderedDict[tuple[int, int, int], Listing] = OrderedDict()
        self._entries = 0

    async def part(self, tree: FileTree, directory: int, position: int) -> Listing:
        """Return entries from a position on, damaged ones as None, and whether they are the last.

        Raises what `ask` raises.
        """
        key = (tree.serial, directory, position)
        found = self._kept.get(key)
        if found is None:
            found = await self._ask(tree, listed, "listing", directory, position)
            self._keep(key, found)
        else:
            self._kept.move_to_end(key)
        return found

    def _keep(self, key: tuple[int, int, int], listing: Listing) -> None:
        if key in self._kept:
            return  # two read it at once
        self._kept[key] = listing
        self._entries += len(listing[0]) + 1
        while self._entries > _KEPT_ENTRIES:
            _, dropped = self._kept.popitem(last=False)
            self._entries -= len(dropped[0]) + 1
