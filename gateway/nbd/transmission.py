"""The second half of an NBD conversation: requests and what they get, until somebody ends it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import structlog

from gateway.errors import Refused
from gateway.nbd import protocol
from gateway.nbd.negotiation import Agreed
from gateway.nbd.protocol import Command, CommandFlag, Error, Request
from gateway.nbd.stream import Gone, receive, send
from providers.base import ProviderError

READER_IDLE_S = 10
CONNECTION_IDLE_S = 3600.0
SEND_S = 60
_PART_BYTES = 1024 * 1024
_MOST_RANGES = 1000
_WRITES = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})

log = structlog.get_logger()


def transmit(connection: socket.socket, agreed: Agreed, stopped: Callable[[], bool]) -> None:
    """Answer requests one after the other until the client leaves, `stopped` says so, or nothing came for an hour.

    The storage's reader is closed while nothing comes. Raises Violation, Gone.
    """
    export = agreed.export
    heard = time.monotonic()
    while not stopped():
        try:
            header = receive(connection, protocol.REQUEST_HEADER.size)
        except TimeoutError:
            if time.monotonic() - heard > CONNECTION_IDLE_S:
                return
            export.release()
            continue
        heard = time.monotonic()
        request = protocol.parse_request(header)
        if request.command == Command.DISCONNECT:
            return
        _answer(connection, agreed, request)


def _answer(connection: socket.socket, agreed: Agreed, request: Request) -> None:
    """Answer one request. What goes wrong at the storage is the client's EIO and our log's line."""
    try:
        if request.command == Command.READ:
            _read(connection, agreed, request)
        elif request.command == Command.BLOCK_STATUS and agreed.allocation:
            _status(connection, agreed, request)
        elif request.command in _WRITES:
            if request.command == Command.WRITE:
                _skip(connection, request.length)
            _refuse(connection, agreed, request, Error.PERM, "exports are read-only")
        else:
            _refuse(connection, agreed, request, Error.INVAL, "no command of this export")
    except (Refused, ProviderError) as error:
        name = agreed.export.name
        log.warning("nbd read failed", export=name, offset=request.offset, reason=error.reason, error=str(error))
        code = Error.IO if isinstance(error, ProviderError) else Error.SHUTDOWN
        _refuse(connection, agreed, request, code, str(error))


def _read(connection: socket.socket, agreed: Agreed, request: Request) -> None:
    export, offset, length = agreed.export, request.offset, request.length
    if not 0 < length <= protocol.REQUEST_BYTES or offset + length > export.size_bytes:
        _refuse(connection, agreed, request, Error.INVAL, "not a range of this export, or more than 32 MiB")
        return
    end = offset + length
    if not agreed.structured:
        part = export.read(offset, min(length, _PART_BYTES))
        send(connection, protocol.simple_reply(request.cookie), part)
        try:
            while (offset := offset + len(part)) < end:
                part = export.read(offset, min(end - offset, _PART_BYTES))
                send(connection, part)
        except (Refused, ProviderError) as error:
            # the reply has begun as a success; only the end of the connection can take that back
            raise Gone(str(error)) from error
        return
    while offset < end:
        part = export.read(offset, min(end - offset, _PART_BYTES))
        last = offset + len(part) == end
        send(connection, protocol.data_chunk(request.cookie, offset, len(part), last=last), part)
        offset += len(part)


def _status(connection: socket.socket, agreed: Agreed, request: Request) -> None:
    if not request.length or request.offset + request.length > agreed.export.size_bytes:
        _refuse(connection, agreed, request, Error.INVAL, "not a range of this export")
        return
    most = 1 if request.flags & CommandFlag.REQ_ONE else _MOST_RANGES
    ranges = agreed.export.status(request.offset, request.length, most)
    send(connection, protocol.status_chunk(request.cookie, ranges))


def _skip(connection: socket.socket, length: int) -> None:
    """Take a write's bytes off the connection. Raises Gone when there are too many."""
    if length > protocol.REQUEST_BYTES:
        raise Gone("it writes more than 32 MiB at once")
    while length:
        try:
            length -= len(receive(connection, min(length, _PART_BYTES)))
        except TimeoutError:
            raise Gone("it does not send what it announced") from None


def _refuse(connection: socket.socket, agreed: Agreed, request: Request, code: int, words: str) -> None:
    if agreed.structured:
        send(connection, protocol.error_chunk(request.cookie, code, words))
    else:
        send(connection, protocol.simple_reply(request.cookie, code))
