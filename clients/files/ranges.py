"""Disks, partitions and logical volumes as the file objects that the libyal libraries read from."""

from __future__ import annotations

import os
import socket
from collections import OrderedDict
from typing import Any, Protocol

from clients.files import wire

_PAGE_BYTES = 64 * 1024
_PAGES = 512


class Bytes(Protocol):
    """Random access to bytes."""

    size_bytes: int

    def pread(self, offset: int, length: int) -> bytes:
        """Return bytes, fewer only at the end. Raises OSError."""


class LocalDisk:
    """An open file."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        """Take it."""
        self._descriptor = descriptor
        self.size_bytes = size_bytes

    def pread(self, offset: int, length: int) -> bytes:
        """See Bytes."""
        return os.pread(self._descriptor, length, offset)


class AskedDisk:
    """A disk whose bytes the process that started us reads for us; pages are kept, 32 MiB of them."""

    def __init__(self, number: int, size_bytes: int, asked: socket.socket) -> None:
        """Take the socket that answers (number, offset, length) with bytes, or with text for an error."""
        self._number = number
        self._asked = asked
        self._pages: OrderedDict[int, bytes] = OrderedDict()
        self.size_bytes = size_bytes

    def pread(self, offset: int, length: int) -> bytes:
        """See Bytes."""
        length = max(0, min(length, self.size_bytes - offset))
        first, last = offset // _PAGE_BYTES, (offset + length - 1) // _PAGE_BYTES
        if length > 4 * _PAGE_BYTES:
            return self._ask(offset, length)
        content = b"".join(self._page(number) for number in range(first, last + 1))
        begin = offset - first * _PAGE_BYTES
        return content[begin : begin + length]

    def _page(self, number: int) -> bytes:
        page = self._pages.get(number)
        if page is None:
            offset = number * _PAGE_BYTES
            page = self._ask(offset, min(_PAGE_BYTES, self.size_bytes - offset))
            self._pages[number] = page
            if len(self._pages) > _PAGES:
                self._pages.popitem(last=False)
        else:
            self._pages.move_to_end(number)
        return page

    def _ask(self, offset: int, length: int) -> bytes:
        wire.send(self._asked, [self._number, offset, length])
        answer = wire.receive(self._asked)
        if not isinstance(answer, bytes):
            raise OSError(str(answer))
        return answer


class Part:
    """A range of something."""

    def __init__(self, whole: Bytes, offset: int, size_bytes: int) -> None:
        """Take the range; what lies beyond the end of the whole is cut off."""
        self._whole = whole
        self._offset = offset
        self.size_bytes = max(0, min(size_bytes, whole.size_bytes - offset))

    def pread(self, offset: int, length: int) -> bytes:
        """See Bytes."""
        return self._whole.pread(self._offset + offset, max(0, min(length, self.size_bytes - offset)))


class LibraryBytes:
    """What a libyal library gives as a file object: a logical volume, an unlocked LUKS volume."""

    def __init__(self, source: Any) -> None:
        """Take the library's object."""
        self._source = source
        self.size_bytes = int(source.get_size())

    def pread(self, offset: int, length: int) -> bytes:
        """See Bytes."""
        self._source.seek(offset, os.SEEK_SET)
        content: bytes = self._source.read(max(0, min(length, self.size_bytes - offset)))
        return content


class FileObject:
    """Bytes with a position, as the libyal libraries want them."""

    def __init__(self, source: Bytes) -> None:
        """Take them."""
        self._source = source
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        """Read on."""
        content = self._source.pread(self._position, self._source.size_bytes if size < 0 else size)
        self._position += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        """Go elsewhere."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._source.size_bytes}[whence]
        self._position = base + offset

    def get_offset(self) -> int:
        """Return the position."""
        return self._position

    tell = get_offset

    def get_size(self) -> int:
        """Return the size in bytes."""
        return self._source.size_bytes
