"""The bytes of a member as random-access blocks, by the quickest way there is from here.

That is the member's own raw file, then the gateway's NBD export of it, both on the gateway's host only; else the
contract's ReadBlocks. While the gateway is away reads are repeated until GIVE_UP_S have passed, and then fail with EIO.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import Protocol, TypeVar

import structlog

from clients.gateway import Gateway
from clients.nbd_blocks import NbdBlocks
from clients.page_cache import PageCache
from clients.patience import Away
from clients.remote_blocks import RemoteBlocks
from frostgate.v1 import group_snapshot_pb2 as pb

_SAMPLE_BYTES = 64 * 1024
B = TypeVar("B", "FileBlocks", NbdBlocks)
_log = structlog.get_logger()


class Pending(Protocol):
    """A read that was asked for. Use finish() or abandon()."""

    def fileno(self) -> int:
        """Return what becomes readable when the answer is there."""

    def finish(self) -> bytes:
        """Return the answer. Raises Away, OSError."""

    def abandon(self) -> None:
        """Do without it; nothing after finish()."""


class Blocks(Protocol):
    """Random access to one member's bytes, as the guest saw them. Thread-safe."""

    size_bytes: int

    fetches: bool
    """Whether at_once(), when it returns None, has begun to fetch from a local disk, and read() waits for that only."""

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes of a range, fewer only at the end. Raises OSError EIO when the storage stays away."""

    def at_once(self, offset: int, length: int) -> bytes | None:
        """Return what read() would, or None when that has to be waited for."""

    def begin(self, offset: int, length: int) -> Pending | None:
        """Ask for a range without waiting, or return None when read() is the way."""

    def descriptor(self) -> int | None:
        """Return the open local file, or None when there is none."""

    def allocated_bytes(self) -> int:
        """Return how many bytes are not holes. Raises OSError."""

    def close(self) -> None:
        """Free everything; may be called twice."""


def open_blocks(gateway: Gateway, snapshot: pb.GroupSnapshot, member: pb.Member, cache: PageCache) -> Blocks:
    """Return the blocks of a member of a READY snapshot. Raises GatewayError, OSError."""
    remote = RemoteBlocks(gateway, snapshot, member, cache)
    if gateway.endpoint.address.startswith("unix:"):
        if member.local_path and member.format == "raw":
            with suppress(OSError):
                return _same(FileBlocks.open(member.local_path), remote)
        if member.nbd_uri:
            try:
                return _same(NbdBlocks(gateway, snapshot, member, cache), remote)
            except (Away, OSError) as error:
                _log.warning("not_by_nbd", group_snapshot=snapshot.id, volume=member.volume.volume, error=str(error))
    return remote


def _same(found: B, remote: RemoteBlocks) -> B:
    """Return what was found, if it is the member. Raises OSError, Away.

    A socket may be forwarded from another host, where the same path is something else.
    """
    try:
        size = remote.size_bytes
        same = found.size_bytes == size and all(
            found.read(offset, _SAMPLE_BYTES) == remote.read(offset, _SAMPLE_BYTES)
            for offset in (0, max(0, size - _SAMPLE_BYTES))
        )
    except BaseException:
        found.close()
        raise
    if not same:
        found.close()
        raise OSError(errno.ESTALE, "is not the member")
    return found


class _Descriptor:
    """An open file, closed when nobody holds this object any more: its number is no other file's before that."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class FileBlocks:
    """A raw file on this host."""

    def __init__(self, descriptor: int) -> None:
        """Take over an open descriptor."""
        self._file: _Descriptor | None = _Descriptor(descriptor)
        self.size_bytes = os.fstat(descriptor).st_size
        self.fetches = True

    @classmethod
    def open(cls, path: str) -> FileBlocks:
        """Open a regular file. Raises OSError."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.ESTALE, "is not the member's file", path)
        return cls(descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """See Blocks."""
        file = self._opened()
        return os.pread(file.number, length, offset)

    def at_once(self, offset: int, length: int) -> bytes | None:
        """See Blocks: what the page cache has. Source: preadv2(2), RWF_NOWAIT."""
        content = bytearray(max(0, min(length, self.size_bytes - offset)))
        file = self._file
        if self.fetches and file:
            try:
                if os.preadv(file.number, [content], offset, os.RWF_NOWAIT) == len(content):
                    return bytes(content)
            except BlockingIOError:
                pass  # not in the cache; the kernel reads it now
            except OSError:
                self.fetches = False  # NFS, for one, cannot tell; read() tells what else is wrong
        return None

    def begin(self, offset: int, length: int) -> None:
        """See Blocks."""

    def descriptor(self) -> int:
        """See Blocks."""
        return self._opened().number

    def allocated_bytes(self) -> int:
        """See Blocks."""
        file = self._opened()
        return os.fstat(file.number).st_blocks * 512

    def close(self) -> None:
        """See Blocks."""
        self._file = None

    def _opened(self) -> _Descriptor:
        if self._file is None:
            raise OSError(errno.ESTALE, "the snapshot was closed")
        return self._file
