"""Bytes through a blocking socket: all of them, or an error."""

from __future__ import annotations

import socket
import struct

from gateway.nbd.protocol import Violation


class Gone(Exception):
    """The other side closed the connection, or does not take what it asked for."""


def set_timeouts(connection: socket.socket, receive_s: float, send_s: float) -> None:
    """Bound how long receive() and send() wait. Not settimeout(): that makes every call poll first."""
    for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), 0))


def receive(connection: socket.socket, length: int) -> bytes:
    """Return exactly so many bytes. Raises Gone, Violation when it stops in the middle, TimeoutError at the begin."""
    if not length:
        return b""
    try:
        content = connection.recv(length, socket.MSG_WAITALL)
    except BlockingIOError:
        raise TimeoutError from None
    except OSError as error:
        raise Gone(str(error)) from error
    if not content:
        raise Gone("closed")
    if len(content) < length:
        raise Violation("it stops in the middle")
    return content


def send(connection: socket.socket, *parts: bytes) -> None:
    """Send all of it, in one call where the kernel takes it so. Raises Gone."""
    try:
        sent = connection.sendmsg(parts)
        if sent < sum(map(len, parts)):
            connection.sendall(memoryview(b"".join(parts))[sent:])
    except OSError as error:  # also EAGAIN, when nobody takes it
        raise Gone(str(error)) from error
