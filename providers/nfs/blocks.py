"""Reading a member's bytes as the guest saw them, from raw files directly and from all others through qemu-nbd."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

from providers.base import BlockReader, CapabilityMissing, Extent, PoolUnavailable, ProviderError
from providers.nfs import copying, qemu

_START_TIMEOUT_S = 20.0
_NOT_YET = ("ENOENT", "ECONNREFUSED")
_EXTENTS_BYTES = 1024 * 1024 * 1024


class RawReader(BlockReader):
    """A raw image file."""

    def __init__(self, descriptor: int) -> None:
        """Take over an open descriptor."""
        self._descriptor = descriptor
        self.size_bytes = os.fstat(descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        """See BlockReader."""
        content = b""
        while len(content) < length:
            part = os.pread(self._descriptor, length - len(content), offset + len(content))
            if not part:
                raise PoolUnavailable("the snapshot's file is shorter than it was")
            content += part
        return content

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See BlockReader."""
        return copying.data(self._descriptor, offset, offset + length)

    def close(self) -> None:
        """See BlockReader."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class ImageReader(BlockReader):
    """An image with all that lies below it, served by a qemu-nbd of our own on a private socket; it dies with us."""

    def __init__(self, chain: qemu.Chain) -> None:
        """Start it; the chain's descriptors can be closed afterwards.

        Raises CapabilityMissing (encrypted; no qemu-nbd or libnbd), SnapshotDamaged, PoolUnavailable.
        """
        self._nbd: Any = None
        self._server: subprocess.Popen[bytes] | None = None
        nbd = _libnbd()
        self._directory = tempfile.mkdtemp(prefix="frostgate-read-")
        try:
            self._start(nbd, chain)
        except BaseException:
            self.close()
            raise

    def _start(self, nbd: Any, chain: qemu.Chain) -> None:
        socket = f"{self._directory}/nbd.sock"
        words = ["--read-only", "--persistent", "--shared=1", "--socket", socket, qemu.source(chain)]
        with tempfile.TemporaryFile() as said:
            descriptors = qemu.descriptors_of(chain)
            self._server = qemu.start("qemu-nbd", words, descriptors, stdout=subprocess.DEVNULL, stderr=said)
            deadline = time.monotonic() + _START_TIMEOUT_S
            while self._nbd is None:
                try:
                    self._nbd = _connected(nbd, socket)
                except nbd.Error as error:
                    # its socket is there before it listens, and it listens before it has opened the image
                    if self._server.poll() is not None or error.errno not in _NOT_YET:
                        raise self._why(said, str(error)) from error
                    if time.monotonic() > deadline:
                        raise PoolUnavailable("qemu-nbd does not start") from error
                    time.sleep(0.01)
        self.size_bytes = self._nbd.get_size()

    def _why(self, said: IO[bytes], otherwise: str) -> ProviderError:
        """Return what a server that does not serve says."""
        assert self._server  # noqa: S101 - for the type checker
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(_START_TIMEOUT_S)
        said.seek(0)
        words = said.read(65536).decode(errors="replace")
        return qemu.failure("qemu-nbd", words) if words else PoolUnavailable(f"qemu-nbd: {otherwise}")

    def read(self, offset: int, length: int) -> bytes:
        """See BlockReader."""
        try:
            return bytes(self._nbd.pread(length, offset))
        except Exception as error:  # libnbd raises an Error of its own, of which no stub tells
            raise PoolUnavailable(f"qemu-nbd: {error}") from error

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See BlockReader."""
        end = offset + length
        while offset < end:
            entries = self._status(offset, min(_EXTENTS_BYTES, end - offset))
            for size, flags in zip(entries[::2], entries[1::2], strict=True):
                size = min(size, end - offset)  # noqa: PLW2901
                if size > 0 and not flags & 2:  # NBD_STATE_ZERO
                    yield Extent(offset, size)
                offset += size

    def _status(self, offset: int, length: int) -> list[int]:
        """Return (length, flags) pairs, flattened, from an offset on."""
        entries: list[int] = []
        try:
            self._nbd.block_status(length, offset, lambda _name, _at, found, _error: entries.extend(found))
        except Exception as error:  # see read()
            raise PoolUnavailable(f"qemu-nbd: {error}") from error
        if not entries:
            raise PoolUnavailable("qemu-nbd does not tell what is allocated")
        return entries

    def close(self) -> None:
        """See BlockReader."""
        self._nbd = None
        if self._server:
            self._server.kill()
            self._server.wait()
            self._server = None
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = ""


def _connected(nbd: Any, socket: str) -> Any:
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.connect_unix(socket)
    return handle


def _libnbd() -> Any:
    try:
        import nbd
    except ImportError:
        raise CapabilityMissing("reading qcow2 needs libnbd's Python binding (Debian: python3-libnbd)") from None
    return nbd


def reader(chain: qemu.Chain) -> BlockReader:
    """Return a reader of a chain, whose descriptors can be closed afterwards. Raises as ImageReader."""
    if [image.format for image in chain] == ["raw"]:
        return RawReader(os.dup(chain[0].descriptor))
    return ImageReader(chain)
