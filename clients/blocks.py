"""The bytes of a member as random-access blocks: from its local file where there is one, else through the gateway.

Through the gateway, what is read in order comes by one stream that runs ahead; what is read at random comes in
pages. Both go through a cache of bounded size, which all members of a process may share. While the gateway is away
reads are repeated until GIVE_UP_S have passed, and then fail with EIO.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import grpc
import structlog

from clients.gateway import Gateway, GatewayError
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc

PAGE_BYTES = 64 * 1024
CACHE_BYTES = 64 * 1024 * 1024
GIVE_UP_S = 30.0
_AHEAD_BYTES = 4 * 1024 * 1024
_STREAMS = 4
_SAMPLE_BYTES = 64 * 1024
_ZEROS = bytes(PAGE_BYTES)
_log = structlog.get_logger()


class Blocks(Protocol):
    """Random access to one member's bytes, as the guest saw them. Thread-safe."""

    size_bytes: int

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes of a range, fewer only at the end. Raises OSError EIO when the storage stays away."""

    def descriptor(self) -> int | None:
        """Return the open local file, or None when there is none."""

    def allocated_bytes(self) -> int:
        """Return how many bytes are not holes. Raises OSError."""

    def close(self) -> None:
        """Free everything; may be called twice."""


class PageCache:
    """Pages by member and number, the least recently used ones dropped. Thread-safe."""

    def __init__(self, size_bytes: int = CACHE_BYTES) -> None:
        """Take the bound."""
        self._limit = max(1, size_bytes // PAGE_BYTES)
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
        """Keep a page."""
        with self._lock:
            self._pages[member, number] = page
            self._pages.move_to_end((member, number))
            while len(self._pages) > self._limit:
                self._pages.popitem(last=False)


def open_blocks(gateway: Gateway, snapshot: pb.GroupSnapshot, member: pb.Member, cache: PageCache) -> Blocks:
    """Return the blocks of a member of a READY snapshot. Raises GatewayError, OSError."""
    remote = RemoteBlocks(gateway, snapshot.id, member, cache)
    if member.local_path and member.format == "raw" and gateway.endpoint.address.startswith("unix:"):
        with suppress(OSError):
            return _local(remote, member)
    return remote


def _local(remote: RemoteBlocks, member: pb.Member) -> FileBlocks:
    """Return the member's own file. Raises OSError unless it is there and begins as the gateway says."""
    descriptor = os.open(member.local_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != member.size_bytes:
            raise OSError(errno.ESTALE, "is not the member's file", member.local_path)  # noqa: TRY301
        # a socket may be forwarded from another host, where the same path is another file
        for offset in (0, max(0, member.size_bytes - _SAMPLE_BYTES)):
            if os.pread(descriptor, _SAMPLE_BYTES, offset) != remote.read(offset, _SAMPLE_BYTES):
                raise OSError(errno.ESTALE, "is not the member's file", member.local_path)  # noqa: TRY301
    except BaseException:
        os.close(descriptor)
        raise
    return FileBlocks(descriptor, member.local_path)


class FileBlocks:
    """A raw file on this host."""

    def __init__(self, descriptor: int, path: str) -> None:
        """Take over an open descriptor."""
        self._descriptor = descriptor
        self.path = path
        self.size_bytes = os.fstat(descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        """See Blocks."""
        return os.pread(self._descriptor, length, offset)

    def descriptor(self) -> int:
        """See Blocks."""
        return self._descriptor

    def allocated_bytes(self) -> int:
        """See Blocks."""
        return os.fstat(self._descriptor).st_blocks * 512

    def close(self) -> None:
        """See Blocks."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass
class _Stream:
    """A ReadBlocks call under way; `position` is where its next part begins."""

    parts: Iterator[rpc.ReadBlocksResponse]
    position: int


class RemoteBlocks:
    """A member read through the gateway."""

    def __init__(self, gateway: Gateway, snapshot_id: str, member: pb.Member, cache: PageCache) -> None:
        """Take the member; nothing is asked for yet."""
        self.size_bytes = member.size_bytes
        self._gateway = gateway
        self._snapshot_id = snapshot_id
        self._volume = member.volume
        self._cache = cache
        self._key = (snapshot_id, member.volume.pool, member.volume.volume)
        self._streams: list[_Stream] = []
        self._expected: OrderedDict[int, None] = OrderedDict()
        self._allocated: int | None = None
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """See Blocks."""
        length = max(0, min(length, self.size_bytes - offset))
        if not length:
            return b""
        first, last = offset // PAGE_BYTES, (offset + length - 1) // PAGE_BYTES
        pages = [self._cache.get(self._key, number) for number in range(first, last + 1)]
        if None in pages:
            with self._lock:
                pages = self._fetch(first, last)
        content = b"".join(page for page in pages if page is not None)
        begin = offset - first * PAGE_BYTES
        return content[begin : begin + length]

    def descriptor(self) -> None:
        """See Blocks."""

    def allocated_bytes(self) -> int:
        """See Blocks. Asked for once."""
        if self._allocated is None:
            request = rpc.ListAllocatedExtentsRequest(id=self._snapshot_id, volume=self._volume)
            try:
                self._allocated = sum(
                    extent.length
                    for response in self._gateway.stream("ListAllocatedExtents", request)
                    for extent in response.extents
                )
            except GatewayError as error:
                raise OSError(errno.EIO, str(error)) from error
        return self._allocated

    def close(self) -> None:
        """See Blocks."""
        with self._lock:
            for stream in self._streams:
                _end(stream)
            self._streams.clear()

    def _fetch(self, first: int, last: int) -> list[bytes | None]:
        """Return pages, repeating while the gateway is away. Raises OSError EIO."""
        deadline = time.monotonic() + GIVE_UP_S
        pause_s = 0.1
        while True:
            try:
                return list(self._pages(first, last))
            except GatewayError as error:
                for stream in self._streams:
                    _end(stream)
                self._streams.clear()
                lasting = error.status not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
                if lasting or time.monotonic() + pause_s > deadline:
                    _log.error(
                        "read_failed", group_snapshot=self._snapshot_id, volume=self._volume.volume, error=str(error)
                    )
                    raise OSError(errno.EIO, str(error)) from error
                _log.warning("read_retried", group_snapshot=self._snapshot_id, volume=self._volume.volume)
                time.sleep(pause_s)
                pause_s = min(2.0, pause_s * 2)

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
        request = rpc.ReadBlocksRequest(id=self._snapshot_id, volume=self._volume, offset=offset, length=length)
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
