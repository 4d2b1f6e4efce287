"""Reading a member's bytes as the guest saw them, from raw files directly and from qcow2 through qemu-nbd."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from providers.base import BlockReader, CapabilityMissing, Extent, PoolUnavailable
from providers.nfs import copying

_START_TIMEOUT_S = 10.0
_EXTERNAL_DATA_FILE = 4
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


class Qcow2Reader(BlockReader):
    """A qcow2 image, served by a qemu-nbd of our own on a private socket; it dies with us."""

    def __init__(self, image: Path) -> None:
        """Start it. Raises CapabilityMissing (refers to other files; no qemu-nbd or libnbd), PoolUnavailable."""
        self._nbd: Any = None
        self._server: subprocess.Popen[bytes] | None = None
        self._directory = ""
        nbd = _libnbd()
        check_self_contained(image)
        if shutil.which("qemu-nbd") is None:
            raise CapabilityMissing("reading qcow2 needs qemu-nbd (Debian: qemu-utils)")
        self._directory = tempfile.mkdtemp(prefix="frostgate-read-")
        try:
            self._start(nbd, image)
        except BaseException:
            self.close()
            raise

    def _start(self, nbd: Any, image: Path) -> None:
        socket = f"{self._directory}/nbd.sock"
        # setpriv, not preexec_fn: running Python between fork and exec is not safe beside gRPC's threads
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "qemu-nbd",
            "--read-only",
            "--persistent",
            "--format=qcow2",
            "--shared=1",
            "--socket",
            socket,
        ]
        try:
            self._server = subprocess.Popen(
                [*command, str(image)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except FileNotFoundError:
            raise CapabilityMissing("reading qcow2 needs setpriv (Debian: util-linux)") from None
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not Path(socket).exists():
            if self._server.poll() is not None:
                said = self._server.stderr.read().decode(errors="replace") if self._server.stderr else ""
                raise PoolUnavailable(f"qemu-nbd cannot open the snapshot: {said.strip()[:500]}")
            if time.monotonic() > deadline:
                raise PoolUnavailable("qemu-nbd does not start")
            time.sleep(0.01)
        self._nbd = nbd.NBD()
        self._nbd.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        self._nbd.connect_unix(socket)
        self.size_bytes = self._nbd.get_size()

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
            if self._server.stderr:
                self._server.stderr.close()
            self._server = None
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = ""


def check_self_contained(image: Path) -> None:
    """Raise CapabilityMissing when a qcow2 image refers to other files.

    Backing files are not part of the snapshot: they may have changed since. And who wrote the image chose their
    names: QEMU would follow them anywhere. Only the header is read. Source: QEMU docs/interop/qcow2.txt.
    """
    with image.open("rb") as file:
        header = file.read(104).ljust(104, b"\0")
    version, backing_offset = struct.unpack_from(">IQ", header, 4)
    incompatible = struct.unpack_from(">Q", header, 72)[0] if version >= 3 else 0
    if backing_offset or incompatible & _EXTERNAL_DATA_FILE:
        raise CapabilityMissing(
            "this qcow2 image has a backing or data file; only self-contained ones can be read through the gateway"
        )


def _libnbd() -> Any:
    try:
        import nbd
    except ImportError:
        raise CapabilityMissing("reading qcow2 needs libnbd's Python binding (Debian: python3-libnbd)") from None
    return nbd
