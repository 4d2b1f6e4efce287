"""What the parser's process and its user say to each other: msgpack in frames with their length.

msgpack, because the answers come from a process that a hostile image may have taken over: decoding them yields
plain values of bounded size and runs nothing.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import astuple, dataclass
from typing import Any

import msgpack

FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Entry:
    """An inode. Times are nanoseconds since 1970; `device` is (major, minor) of a device node; `id` is the tree's."""

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


class Closed(Exception):
    """The other side is gone, or does not speak our language."""


def pack(value: Any) -> Any:
    """Return entries and trees as what msgpack carries."""
    return list(astuple(value)) if isinstance(value, Entry | Tree) else value


def entry(values: Any) -> Entry:
    """Return an Entry of what came. Raises Closed for anything else."""
    try:
        *numbers, (major, minor) = values
        if all(isinstance(number, int) for number in (*numbers, major, minor)):
            return Entry(*numbers, (major, minor))  # type: ignore[call-arg]
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


def send(to: socket.socket, message: Any) -> None:
    """Send one message. Raises Closed."""
    content = msgpack.packb(message, use_bin_type=True)
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
        return msgpack.unpackb(_exactly(source, length), raw=False, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise Closed(str(error)) from error


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
