"""A member read by the contract's ReadBlocks: where the gateway is on another host.

What is read in order comes by one stream that runs ahead; what is read at random comes in pages. Both go through the
cache.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from clients.gateway import Gateway, GatewayError
from clients.page_cache import PageCache
from clients.patience import Away, answered, patiently
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from frostgate.v1 import volume_pb2

PAGE_BYTES = 64 * 1024
_AHEAD_BYTES = 4 * 1024 * 1024
_STREAMS = 4
_ZEROS = bytes(PAGE_BYTES)


def allocated_bytes(gateway: Gateway, snapshot_id: str, volume: volume_pb2.VolumeRef) -> int:
    """Return how many bytes of a member are not holes. Raises OSError."""
    request = rpc.ListAllocatedExtentsRequest(id=snapshot_id, volume=volume)
    try:
        responses = gateway.stream("ListAllocatedExtents", request)
        return sum(extent.length for response in responses for extent in response.extents)
    except GatewayError as error:
        raise OSError(errno.EIO, str(error)) from error


@dataclass
class _Stream:
    """A ReadBlocks call under way; `position` is where its next part begins."""

    parts: Iterator[rpc.ReadBlocksResponse]
    position: int


class RemoteBlocks:
    """A member read through the gateway."""

    fetches = False

    def __init__(self, gateway: Gateway, snapshot: pb.GroupSnapshot, member: pb.Member, cache: PageCache) -> None:
        """Take the member; nothing is asked for yet."""
        self.size_bytes = member.size_bytes
        self._gateway = gateway
        self._snapshot_id = snapshot.id
        self._cut_time = snapshot.cut_time
        self._volume = member.volume
        self._cache = cache
        self._key = (snapshot.id, snapshot.cut_time.ToNanoseconds(), member.volume.pool, member.volume.volume)
        self._streams: list[_Stream] = []
        self._expected: OrderedDict[int, None] = OrderedDict()
        self._allocated: int | None = None
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """See Blocks."""
        length = max(0, min(length, self.size_bytes - offset))
        if not length:
            return b""
        content = self.at_once(offset, length)
        if content is None:
            first, last = offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES
            with self._lock:
                pages = patiently(partial(self._fetch, first, last), self._snapshot_id, self._volume.volume)
            begin = offset - first * PAGE_BYTES
            content = pages[begin : begin + length]
        return content

    def at_once(self, offset: int, length: int) -> bytes | None:
        """See Blocks."""
        length = max(0, min(length, self.size_bytes - offset))
        first, last = offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES
        pages = []
        for number in range(first, last + 1):
            page = self._cache.get(self._key, number)
            if page is None:
                return None
            pages.append(page)
        begin = offset - first * PAGE_BYTES
        return b"".join(pages)[begin : begin + length]

    def begin(self, offset: int, length: int) -> None:
        """See Blocks."""

    def descriptor(self) -> None:
        """See Blocks."""

    def allocated_bytes(self) -> int:
        """See Blocks. Asked for once."""
        if self._allocated is None:
            self._allocated = allocated_bytes(self._gateway, self._snapshot_id, self._volume)
        return self._allocated

    def close(self) -> None:
        """See Blocks."""
        with self._lock:
            for stream in self._streams:
                _end(stream)
            self._streams.clear()

    def _fetch(self, first: int, last: int) -> bytes:
        """Return pages. Raises Away, OSError."""
        try:
            return answered(lambda: b"".join(self._pages(first, last)))
        except (Away, OSError):
            for stream in self._streams:
                _end(stream)
            self._streams.clear()
            raise

    def _pages(self, first: int, last: int) -> Iterator[bytes]:
        for number in range(first, last + 1):
            page = self._cache.get(self._key, number)
            if page is None:
                page = self._from_stream(number) or self._at_random(number, last)
            yield page
        self._expected[last + 1] = None
        self._expected.move_to_end(last + 1)
        while len(self._expected) > 4 * _STREAMS:
            self._expected.popitem(last=False)

    def _from_stream(self, number: int) -> bytes | None:
        """Return a page from a stream that is about to reach it; begin one where a reader goes on in order."""
        offset = number * PAGE_BYTES
        for stream in self._streams:
            if 0 <= offset - stream.position <= _AHEAD_BYTES:
                self._streams.remove(stream)
                self._streams.append(stream)
                return self._advance(stream, number)
        if number not in self._expected or number == 0:
            return None
        while len(self._streams) >= _STREAMS:
            _end(self._streams.pop(0))
        stream = _Stream(self._ask(offset, self.size_bytes - offset), offset)
        self._streams.append(stream)
        return self._advance(stream, number)

    def _advance(self, stream: _Stream, number: int) -> bytes | None:
        """Take parts off a stream until a page is there; None when it ends before."""
        wanted = None
        while stream.position <= number * PAGE_BYTES:
            part = next(stream.parts, None)
            if part is None:
                self._streams.remove(stream)
                break
            for at, page in _cut(part):
                self._cache.put(self._key, at, page)
                if at == number:
                    wanted = page
                # far-reaching zeros are not worth a cache full of them
                if not part.data and at >= number + _AHEAD_BYTES // PAGE_BYTES:
                    break
            stream.position = part.offset + (len(part.data) or part.zero_bytes)
        return wanted

    def _at_random(self, number: int, last: int) -> bytes:
        """Return a page, and put the following ones of the same read into the cache."""
        offset = number * PAGE_BYTES
        length = min((last - number + 1) * PAGE_BYTES, self.size_bytes - offset)
        wanted = b""
        for part in self._ask(offset, length):
            for at, page in _cut(part):
                self._cache.put(self._key, at, page)
                if at == number:
                    wanted = page
        return wanted

    def _ask(self, offset: int, length: int) -> Iterator[rpc.ReadBlocksResponse]:
        request = rpc.ReadBlocksRequest(
            id=self._snapshot_id, volume=self._volume, offset=offset, length=length, cut_time=self._cut_time
        )
        return _whole_pages(self._gateway.stream("ReadBlocks", request), offset, offset + length)


def _whole_pages(parts: Iterator[rpc.ReadBlocksResponse], offset: int, end: int) -> Iterator[rpc.ReadBlocksResponse]:
    """Join parts that end within a page, so that every part but the last is of whole pages.

    `offset` is a multiple of PAGE_BYTES. A part of zeros keeps its form where it fills pages.
    """
    pending = bytearray()
    try:
        for part in parts:
            if part.zero_bytes and not pending:
                whole = part.zero_bytes if offset + part.zero_bytes == end else _floor(part.zero_bytes)
                if whole:
                    yield rpc.ReadBlocksResponse(offset=offset, zero_bytes=whole)
                    offset += whole
                pending += bytes(part.zero_bytes - whole)
                continue
            left = part.zero_bytes
            if left:
                fill = min(left, PAGE_BYTES - len(pending) % PAGE_BYTES)
                pending += bytes(fill)
                left -= fill
            elif not pending and len(part.data) % PAGE_BYTES == 0:
                yield rpc.ReadBlocksResponse(offset=offset, data=part.data)
                offset += len(part.data)
                continue
            else:
                pending += part.data
            whole = len(pending) if offset + len(pending) == end else _floor(len(pending))
            if whole:
                yield rpc.ReadBlocksResponse(offset=offset, data=bytes(pending[:whole]))
                offset += whole
                del pending[:whole]
            whole = left if left and offset + left == end else _floor(left)
            if whole:
                yield rpc.ReadBlocksResponse(offset=offset, zero_bytes=whole)
                offset += whole
            pending += bytes(left - whole)
    finally:
        with suppress(AttributeError):
            parts.close()  # type: ignore[attr-defined]


def _cut(part: rpc.ReadBlocksResponse) -> Iterator[tuple[int, bytes]]:
    """Yield the pages of a part with their numbers."""
    length = len(part.data) or part.zero_bytes
    for begin in range(0, length, PAGE_BYTES):
        size = min(PAGE_BYTES, length - begin)
        yield (part.offset + begin) // PAGE_BYTES, part.data[begin : begin + size] if part.data else _ZEROS[:size]


def _floor(length: int) -> int:
    return length - length % PAGE_BYTES


def _end(stream: _Stream) -> None:
    with suppress(AttributeError):
        stream.parts.close()  # type: ignore[attr-defined]
