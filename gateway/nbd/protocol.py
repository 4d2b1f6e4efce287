"""The NBD protocol as plain values: what is on the wire, and how it is taken apart. No sockets here.

Only what a read-only server needs. Source: NetworkBlockDevice/nbd, doc/proto.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

GREETING = b"NBDMAGIC"
I_HAVE_OPTIONS = b"IHAVEOPT"
_OPTION_REPLY = 0x3E889045565A9
_REQUEST = 0x25609513
_SIMPLE_REPLY = 0x67446698
_STRUCTURED_REPLY = 0x668E33EF

NAME_BYTES = 4096
"""The longest name of an export, and of a metadata context."""

OPTION_BYTES = 64 * 1024
"""The longest option that is taken; more is no client of ours."""

REQUEST_BYTES = 32 * 1024 * 1024
"""The longest range of a read, as the protocol has it for clients that do not ask."""

ALLOCATION = b"base:allocation"
ALLOCATION_ID = 1

OPTION_HEADER = struct.Struct(">8sII")
REQUEST_HEADER = struct.Struct(">IHHQQI")
_OPTION_REPLY_HEADER = struct.Struct(">QIII")
_SIMPLE_HEADER = struct.Struct(">IIQ")
_STRUCTURED_HEADER = struct.Struct(">IHHQI")
_DATA_HEADER = struct.Struct(">IHHQIQ")


class Handshake(IntFlag):
    """Flags of the greeting, the server's and the client's alike."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What a client may ask for before it reads."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    """Answers to options."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007


class Info(IntEnum):
    """What GO and INFO tell of an export."""

    EXPORT = 0
    NAME = 1
    BLOCK_SIZE = 3


class Transmission(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    CAN_MULTI_CONN = 256


EXPORT_FLAGS = Transmission.HAS_FLAGS | Transmission.READ_ONLY | Transmission.CAN_MULTI_CONN


class Command(IntEnum):
    """What a client asks of an export."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """How it is asked."""

    REQ_ONE = 8


class Chunk(IntEnum):
    """Kinds of structured replies."""

    OFFSET_DATA = 1
    BLOCK_STATUS = 5
    ERROR = 32769


DONE = 1
"""The flag of the last chunk of a structured reply."""


class Error(IntEnum):
    """Why a request was not done."""

    PERM = 1
    IO = 5
    INVAL = 22
    SHUTDOWN = 108


class State(IntFlag):
    """What base:allocation says of a range."""

    DATA = 0
    HOLE = 1
    ZERO = 2


class Violation(Exception):
    """The other side does not speak NBD; nothing it says from here on can be understood."""


class BadOption(Exception):
    """An option's content makes no sense; the next one may."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks of an export. `cookie` is his own name for it."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


def parse_option(header: bytes) -> tuple[int, int]:
    """Return an option's number and how many bytes follow. Raises Violation."""
    magic, option, length = OPTION_HEADER.unpack(header)
    if magic != I_HAVE_OPTIONS or length > OPTION_BYTES:
        raise Violation("not an option")
    return option, length


def parse_request(header: bytes) -> Request:
    """Return a request. Raises Violation."""
    magic, *fields = REQUEST_HEADER.unpack(header)
    if magic != _REQUEST:
        raise Violation("not a request")
    return Request(*fields)


def parse_go(content: bytes) -> tuple[str, list[int]]:
    """Return the export's name and the information asked for, of GO and INFO. Raises BadOption."""
    name, rest = _name(content)
    if len(rest) < 2 or len(rest) != 2 + 2 * int.from_bytes(rest[:2], "big"):
        raise BadOption("its length is not that of its parts")
    return name, [number for (number,) in struct.iter_unpack(">H", rest[2:])]


def parse_contexts(content: bytes) -> tuple[str, list[bytes]]:
    """Return the export's name and the queries, of LIST_ and SET_META_CONTEXT. Raises BadOption."""
    name, rest = _name(content)
    if len(rest) < 4:
        raise BadOption("it is too short")
    count, rest = int.from_bytes(rest[:4], "big"), rest[4:]
    queries = []
    for _ in range(count):
        query, rest = _string(rest)
        queries.append(query)
    if rest:
        raise BadOption("its length is not that of its parts")
    return name, queries


def wants_allocation(queries: Sequence[bytes], *, listing: bool) -> bool:
    """Tell whether queries are for base:allocation; without any, a listing is for everything."""
    return ALLOCATION in queries or (listing and (not queries or b"base:" in queries))


def option_reply(option: int, reply: int, content: bytes = b"") -> bytes:
    """Return an answer to an option."""
    return _OPTION_REPLY_HEADER.pack(_OPTION_REPLY, option, reply, len(content)) + content


def server(name: str) -> bytes:
    """Return the content of a SERVER answer."""
    encoded = name.encode()
    return struct.pack(">I", len(encoded)) + encoded


def info_export(size_bytes: int) -> bytes:
    """Return the content of the INFO answer that GO must have."""
    return struct.pack(">HQH", Info.EXPORT, size_bytes, EXPORT_FLAGS)


def info_block_size() -> bytes:
    """Return the content of an INFO answer: any alignment, 64 KiB preferred."""
    return struct.pack(">HIII", Info.BLOCK_SIZE, 1, 64 * 1024, REQUEST_BYTES)


def info_name(name: str) -> bytes:
    """Return the content of an INFO answer."""
    return struct.pack(">H", Info.NAME) + name.encode()


def meta_context() -> bytes:
    """Return the content of a META_CONTEXT answer: base:allocation, the only one there is."""
    return struct.pack(">I", ALLOCATION_ID) + ALLOCATION


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """Return a simple reply; a read's bytes follow."""
    return _SIMPLE_HEADER.pack(_SIMPLE_REPLY, error, cookie)


def data_chunk(cookie: int, offset: int, length: int, *, last: bool) -> bytes:
    """Return the head of a chunk of a read; `length` bytes follow."""
    flags = DONE if last else 0
    return _DATA_HEADER.pack(_STRUCTURED_REPLY, flags, Chunk.OFFSET_DATA, cookie, length + 8, offset)


def error_chunk(cookie: int, error: int, words: str) -> bytes:
    """Return the chunk that ends a reply with an error."""
    text = words.encode()[:NAME_BYTES]
    return _chunk(cookie, Chunk.ERROR, struct.pack(">IH", error, len(text)) + text)


def status_chunk(cookie: int, ranges: Sequence[tuple[int, int]]) -> bytes:
    """Return the answer to a BLOCK_STATUS request: (length, State) from its offset on."""
    content = [struct.pack(">I", ALLOCATION_ID), *(struct.pack(">II", length, state) for length, state in ranges)]
    return _chunk(cookie, Chunk.BLOCK_STATUS, b"".join(content))


def _chunk(cookie: int, kind: int, content: bytes) -> bytes:
    return _STRUCTURED_HEADER.pack(_STRUCTURED_REPLY, DONE, kind, cookie, len(content)) + content


def _name(content: bytes) -> tuple[str, bytes]:
    name, rest = _string(content)
    return decoded_name(name), rest


def decoded_name(name: bytes) -> str:
    """Return an export's name. Raises BadOption."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise BadOption("the name is not UTF-8") from None


def _string(content: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(content[:4], "big")
    if len(content) < 4 or length > min(NAME_BYTES, len(content) - 4):
        raise BadOption("a name is longer than the option, or than 4096 bytes")
    return content[4 : 4 + length], content[4 + length :]
