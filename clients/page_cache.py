"""Parts of members that were read, kept within a bound that all members of a process share."""

from __future__ import annotations

import threading
from collections import OrderedDict

CACHE_BYTES = 64 * 1024 * 1024


class PageCache:
    """Pages by member and number, of any size, the least recently used ones dropped. Thread-safe."""

    def __init__(self, size_bytes: int = CACHE_BYTES) -> None:
        """Take the bound on the bytes kept."""
        self._limit = size_bytes
        self._kept = 0
        self._pages: OrderedDict[tuple[object, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, member: object, number: int) -> bytes | None:
        """Return a page, or None."""
        with self._lock:
            page = self._pages.get((member, number))
            if page is not None:
                self._pages.move_to_end((member, number))
            return page

    def put(self, member: object, number: int, page: bytes) -> None:
        """Keep a page; the last one stays whatever its size."""
        with self._lock:
            before = self._pages.pop((member, number), b"")
            self._pages[member, number] = page
            self._kept += len(page) - len(before)
            while self._kept > self._limit and len(self._pages) > 1:
                self._kept -= len(self._pages.popitem(last=False)[1])
