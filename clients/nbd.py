"""One connection to a read-only NBD export on a unix socket: one request at a time, asked and answered apart.

Source: NetworkBlockDevice/nbd, doc/proto.md and doc/uri.md.
"""

from __future__ import annotations

import errno
import socket
import struct
from urllib.parse import parse_qs, unquote, urlsplit

from clients.patience import Away

ANSWER_S = 60
MOST_BYTES = 32 * 1024 * 1024
"""The longest range that can be asked for at once."""

_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_CHUNK = struct.Struct(">IHHQI")
_INFO_EXPORT = struct.Struct(">HQH")

_FIXED_NEWSTYLE_NO_ZEROES = 3
_GO, _STRUCTURED_REPLY, _SET_META_CONTEXT = 7, 8, 10
_ACK, _INFO, _META_CONTEXT, _IS_ERROR, _ERR_PLATFORM = 1, 3, 4, 0x80000000, 0x80000004
_READ, _DISCONNECT, _BLOCK_STATUS = 0, 2, 7
_DATA, _HOLE, _STATUS, _ERROR_BIT = 1, 2, 5, 0x8000
_DONE, _ZERO = 1, 2
_SMALL_BYTES = 64 * 1024


def parse_uri(uri: str) -> tuple[str, str]:
    """Return the socket's path and the export's name. Raises ValueError."""
    parts = urlsplit(uri)
    sockets = parse_qs(parts.query).get("socket", [])
    if parts.scheme != "nbd+unix" or len(sockets) != 1:
        raise ValueError(f"{uri!r} is no NBD export on a unix socket")
    return sockets[0], unquote(parts.path.removeprefix("/"))


class Connection:
    """An open export. Whatever raises Away leaves it useless: close() it."""

    def __init__(self, path: str, name: str) -> None:
        """Connect and choose the export. Raises Away, OSError EIO when it is refused for good."""
        self.size_bytes = 0
        self._cookie = 0
        self._offset = self._length = 0
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", ANSWER_S, 0))
            try:
                self._socket.connect(path)
            except OSError as error:
                raise Away(f"{path}: {error.strerror}") from error
            self._negotiate(name.encode())
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the socket, which becomes readable when an answer comes."""
        return self._socket.fileno()

    def ask(self, offset: int, length: int) -> None:
        """Ask for 1..MOST_BYTES bytes; answer() takes them. Raises Away."""
        self._request(_READ, offset, length)

    def answer(self) -> bytes:
        """Return the bytes that were asked for. Raises Away, also when the storage is."""
        length = self._length
        # a small answer comes in one piece: one call then, where its head and its bytes would be two
        first = self._some(_CHUNK.size + 8 + (length if length <= _SMALL_BYTES else 0))
        kind, flags, size = self._chunk(first)
        if kind == _DATA and flags & _DONE and size == length + 8:
            there = first[_CHUNK.size + 8 :]
            if int.from_bytes(first[_CHUNK.size : _CHUNK.size + 8], "big") != self._offset:
                raise Away("an answer to something else")
            return there if len(there) == length else there + self._exactly(length - len(there))
        return self._in_parts(first)

    def status(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Return (length, whether it reads as zeros) of ranges from an offset on, for some or all of the length.

        Raises Away.
        """
        self._request(_BLOCK_STATUS, offset, length)
        kind, flags, size = self._chunk(head := self._exactly(_CHUNK.size))
        content = self._exactly(size)
        if kind & _ERROR_BIT:
            raise self._refused(content)
        if kind != _STATUS or not flags & _DONE or size < 12 or size % 8 != 4:
            raise Away(f"an answer that makes no sense ({head.hex()})")
        return [(found, bool(state & _ZERO)) for found, state in struct.iter_unpack(">II", content[4:])]

    def close(self) -> None:
        """Say goodbye and close; may be called twice."""
        if self._socket.fileno() < 0:
            return
        try:
            self._request(_DISCONNECT, 0, 0)
        except Away:
            pass  # gone already
        finally:
            self._socket.close()

    def _in_parts(self, begun: bytes) -> bytes:
        """Return an answer of several chunks, or whose bytes are a hole; what was received of it is `begun`."""
        content = bytearray(self._length)
        received = 0
        while True:
            head, begun = (begun[: _CHUNK.size], begun[_CHUNK.size :]) if begun else (self._exactly(_CHUNK.size), b"")
            kind, flags, size = self._chunk(head)
            body = begun[:size] + self._exactly(size - len(begun[:size]))
            begun = begun[size:]
            if kind & _ERROR_BIT:
                raise self._refused(body)
            if kind in (_DATA, _HOLE) and size >= 8:
                at = int.from_bytes(body[:8], "big") - self._offset
                part = body[8:] if kind == _DATA else bytes(min(int.from_bytes(body[8:], "big"), self._length))
                if at < 0 or at + len(part) > self._length:
                    raise Away("an answer beyond the question")
                content[at : at + len(part)] = part
                received += len(part)
            if flags & _DONE:
                break
        if received != self._length:
            raise Away("an answer that is not whole")
        return bytes(content)

    def _chunk(self, head: bytes) -> tuple[int, int, int]:
        """Return kind, flags and size of a chunk."""
        if len(head) < _CHUNK.size:
            head += self._exactly(_CHUNK.size - len(head))
        magic, flags, kind, cookie, size = _CHUNK.unpack_from(head)
        if magic != 0x668E33EF or cookie != self._cookie or size > MOST_BYTES + 8:
            raise Away("an answer that makes no sense")
        return kind, flags, size

    def _refused(self, content: bytes) -> Away:
        words = content[6:].decode(errors="replace")
        return Away(words or f"error {int.from_bytes(content[:4], 'big')}")

    def _request(self, command: int, offset: int, length: int) -> None:
        self._cookie += 1
        self._offset, self._length = offset, length
        self._send(_REQUEST.pack(0x25609513, 0, command, self._cookie, offset, length))

    def _negotiate(self, name: bytes) -> None:
        if self._exactly(16) != b"NBDMAGICIHAVEOPT":
            raise OSError(errno.EIO, "no NBD server")
        self._exactly(2)
        self._send(struct.pack(">I", _FIXED_NEWSTYLE_NO_ZEROES))
        named = struct.pack(">I", len(name)) + name
        context = b"base:allocation"
        self._option(_STRUCTURED_REPLY, b"")
        self._option(_SET_META_CONTEXT, named + struct.pack(">II", 1, len(context)) + context)
        for info in self._option(_GO, named + b"\0\0"):
            if len(info) == _INFO_EXPORT.size and info[:2] == b"\0\0":
                self.size_bytes = _INFO_EXPORT.unpack(info)[1]

    def _option(self, option: int, content: bytes) -> list[bytes]:
        """Ask for an option and return what is told before it is granted. Raises Away, OSError EIO."""
        self._send(_OPTION.pack(b"IHAVEOPT", option, len(content)) + content)
        told: list[bytes] = []
        while True:
            _, _, reply, size = _OPTION_REPLY.unpack(self._exactly(_OPTION_REPLY.size))
            if size > _SMALL_BYTES:
                raise OSError(errno.EIO, "no NBD server")
            body = self._exactly(size)
            if reply == _ACK:
                return told
            if reply & _IS_ERROR:
                words = body.decode(errors="replace") or f"option {option} is refused"
                raise Away(words) if reply == _ERR_PLATFORM else OSError(errno.EIO, words)
            told.append(body)

    def _send(self, content: bytes) -> None:
        try:
            self._socket.sendall(content)
        except OSError as error:
            raise Away(f"the connection broke ({error.strerror})") from error

    def _some(self, length: int) -> bytes:
        """Return what is there, at least a byte."""
        try:
            content = self._socket.recv(length)
        except OSError as error:
            raise Away(f"no answer ({error.strerror})") from error
        if not content:
            raise Away("the connection was closed")
        return content

    def _exactly(self, length: int) -> bytes:
        try:
            content = self._socket.recv(length, socket.MSG_WAITALL) if length else b""
        except OSError as error:
            raise Away(f"no answer ({error.strerror})") from error
        if len(content) < length:
            raise Away("the connection was closed")
        return content
