"""What the parser's process and its user say to each other: msgpack in frames with their length.

msgpack, because the answers come from a process that a hostile image may have taken over: decoding them yields
plain values of bounded size and runs nothing.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Any

import msgpack

FRAME_BYTES = 64 * 1024 * 1024
READ_BYTES = 1024 * 1024
_ZEROS = bytes(READ_BYTES)
_HOLES_BYTES = 1024 * 1024
_LENGTH = struct.Struct(">I")
_LARGE_NUMBER = 1
_LARGE_NUMBER_BYTES = 12
_FIRST_NS, _END_NS = -62135596800 * 10**9, 253402300800 * 10**9
"""The years 1 to 9999, which is more than POSIX file systems have, and as far as Python's datetime goes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An inode. Times are nanoseconds since 1970; `device` is (major, minor) of a device node; `id` is the tree's.

    `attributed` is false when it surely has no extended attributes.
    """

    id: int
    mode: int
    links: int
    uid: int
    gid: int
    size_bytes: int
    allocated_bytes: int
    mtime_ns: int
    atime_ns: int
    ctime_ns: int
    device: tuple[int, int] = (0, 0)
    attributed: bool = True

    @property
    def sparse(self) -> bool:
        """Whether its holes are so large that asking where they are costs less than reading them."""
        return self.size_bytes - self.allocated_bytes >= _HOLES_BYTES


@dataclass(frozen=True, slots=True)
class Tree:
    """A partition or logical volume on the disks number `disks`.

    `kind` is the file system's; `note` says what a reader should know, `why_not` why it cannot be read.
    """

    disks: tuple[int, ...]
    name: str
    kind: str
    label: str = ""
    note: str = ""
    why_not: str = ""


_ENTRY = tuple(Entry.__dataclass_fields__)
_TREE = tuple(Tree.__dataclass_fields__)


class Closed(Exception):
    """The other side is gone, or does not speak our language."""


def pack(value: Entry | Tree) -> list[Any]:
    """Return an entry or a tree as what msgpack carries."""
    # not dataclasses.astuple, which copies deeply and is what a listing would spend its time on
    return [getattr(value, name) for name in (_ENTRY if isinstance(value, Entry) else _TREE)]


def entry(values: Any) -> Entry:
    """Return an Entry of what came. Raises Closed for anything else, or for numbers that no file can have."""
    try:
        *numbers, (major, minor), attributed = values
        found = Entry(*numbers, (major, minor), bool(attributed))  # type: ignore[call-arg]
        small = (found.mode, found.links, found.uid, found.gid, 2 * major, 2 * minor)  # makedev(3) takes ints
        large = (found.id, found.size_bytes, found.allocated_bytes)
        times_ns = (found.mtime_ns, found.atime_ns, found.ctime_ns)
        if (
            all(type(number) is int and 0 <= number < 1 << 32 for number in small)
            and all(type(number) is int and 0 <= number < 1 << 63 for number in large)
            and all(type(time) is int and _FIRST_NS <= time < _END_NS for time in times_ns)
        ):
            return found
    except (TypeError, ValueError):
        pass  # said below
    raise Closed("not an entry")


def tree(values: Any) -> Tree:
    """Return a Tree of what came. Raises Closed for anything else."""
    try:
        disks, *words = values
        found = Tree(tuple(disks), *words)
    except (TypeError, ValueError):
        raise Closed("not a tree") from None
    if not all(isinstance(word, str) for word in words) or not all(isinstance(disk, int) for disk in disks):
        raise Closed("not a tree")
    return found


def pack_content(content: bytes) -> bytes | int:
    """Return a file's bytes as what msgpack carries: zeros, of which sparse files have many, as their number."""
    if not content or content[0] or content[-1] or len(content) > len(_ZEROS):
        return content
    zeros = _ZEROS if len(content) == len(_ZEROS) else _ZEROS[: len(content)]
    return len(content) if content == zeros else content


def content(value: Any, most_bytes: int) -> bytes:
    """Return the bytes of what came. Raises Closed for anything else."""
    if isinstance(value, bytes):
        return value[:most_bytes]
    if isinstance(value, int) and 0 <= value <= len(_ZEROS):
        value = min(value, most_bytes)
        return _ZEROS if value == len(_ZEROS) else _ZEROS[:value]
    raise Closed("not a file's content")


def send(to: socket.socket, message: Any) -> None:
    """Send one message. Raises Closed."""
    content = msgpack.packb(message, use_bin_type=True, default=_large_number)
    try:
        to.sendall(_LENGTH.pack(len(content)) + content)
    except OSError as error:
        raise Closed(str(error)) from error


def receive(source: socket.socket) -> Any:
    """Wait for one message. Raises Closed, TimeoutError when the socket has a timeout."""
    (length,) = _LENGTH.unpack(_exactly(source, _LENGTH.size))
    if length > FRAME_BYTES:
        raise Closed("too long a message")
    try:
        return msgpack.unpackb(_exactly(source, length), raw=False, strict_map_key=False, ext_hook=_extension)
    except (ValueError, TypeError, msgpack.UnpackException) as error:  # TypeError: a list as a key
        raise Closed(str(error)) from error


def _large_number(value: object) -> msgpack.ExtType:
    """Return what msgpack's numbers of 64 bits do not hold: nanoseconds after 2554, before 1677."""
    if not isinstance(value, int):
        raise TypeError(f"not for the wire: {type(value).__name__}")
    return msgpack.ExtType(_LARGE_NUMBER, value.to_bytes(_LARGE_NUMBER_BYTES, "big", signed=True))


def _extension(kind: int, content: bytes) -> int:
    if kind != _LARGE_NUMBER or len(content) != _LARGE_NUMBER_BYTES:
        raise ValueError("an unknown kind of value")
    return int.from_bytes(content, "big", signed=True)


def _exactly(source: socket.socket, length: int) -> bytes:
    content = bytearray(length)
    view = memoryview(content)
    have = 0
    while have < length:
        try:
            count = source.recv_into(view[have:])
        except TimeoutError:
            raise
        except OSError as error:
            raise Closed(str(error)) from error
        if not count:
            raise Closed("the other side ended")
        have += count
    return bytes(content)
