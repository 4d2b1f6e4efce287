"""Reading members from their devices, and finding what differs between two of them by reading both.

StorPool's API does not tell which blocks of a snapshot are allocated or changed. A block device has no holes to ask
for either, so what is zero is found by reading; where the device is a file (the simulator), its holes are used.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress

from providers.base import BlockReader, Extent, PoolUnavailable
from providers.extents import merged
from providers.storpool.devices import Devices
from providers.storpool.objects import Found

_WINDOW = 1 << 20
_BLOCK = 4096
_ZEROS = bytes(_WINDOW)


class DeviceReader(BlockReader):
    """One member's snapshot, attached read-only to this host until it is closed."""

    def __init__(self, devices: Devices, snapshot: Found) -> None:
        """Attach and open it. Raises CapabilityMissing, PoolUnavailable."""
        self._devices = devices
        self._snapshot = snapshot
        self.size_bytes = snapshot.size_bytes
        self._descriptor = -1
        path = devices.take(snapshot)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            devices.give_back(snapshot)
            raise PoolUnavailable(f"{path} cannot be opened: {error.strerror}") from error

    def read(self, offset: int, length: int) -> bytes:
        """See BlockReader."""
        parts = []
        while length > 0:
            try:
                part = os.pread(self._descriptor, length, offset)
            except OSError as error:
                raise PoolUnavailable(f"the device of {self._snapshot.by_id} fails: {error.strerror}") from error
            if not part:
                raise PoolUnavailable(f"the device of {self._snapshot.by_id} ends at {offset}")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See BlockReader."""
        yield from merged(self._not_zero(offset, offset + length))

    def data(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of what may have data: all of it, unless the device is a file with holes."""
        position = offset
        while position < end:
            try:
                begin = os.lseek(self._descriptor, position, os.SEEK_DATA)
                position = os.lseek(self._descriptor, begin, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole until the end
                    return
                yield position, end
                return
            if begin < end:
                yield begin, min(position, end)

    def close(self) -> None:
        """See BlockReader."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with suppress(OSError):
                os.close(descriptor)
            self._devices.give_back(self._snapshot)

    def _not_zero(self, offset: int, end: int) -> Iterator[Extent]:
        for begin, data_end in self.data(offset, end):
            for window in range(begin, data_end, _WINDOW):
                content = self.read(window, min(_WINDOW, data_end - window))
                yield from _differing(window, content, _ZEROS[: len(content)])


def differences(newer: DeviceReader, older: DeviceReader) -> Iterator[Extent]:
    """Yield what of the newer member is not the same in the older one, in blocks of 4 KiB."""
    yield from merged(_differing_windows(newer, older))


def _differing_windows(newer: DeviceReader, older: DeviceReader) -> Iterator[Extent]:
    shared = min(newer.size_bytes, older.size_bytes)
    for begin in range(0, shared, _WINDOW):
        length = min(_WINDOW, shared - begin)
        if any(newer.data(begin, begin + length)) or any(older.data(begin, begin + length)):
            yield from _differing(begin, newer.read(begin, length), older.read(begin, length))
    if newer.size_bytes > shared:
        yield from newer.extents(shared, newer.size_bytes - shared)


def _differing(offset: int, one: bytes, other: bytes) -> Iterator[Extent]:
    """Yield the blocks, aligned to their size where `offset` is, in which two pieces of the same length differ."""
    if one == other:
        return
    for begin in range(0, len(one), _BLOCK):
        block = one[begin : begin + _BLOCK]
        if block != other[begin : begin + _BLOCK]:
            yield Extent(offset + begin, len(block))
