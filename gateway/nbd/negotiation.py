"""The first half of an NBD conversation: from the greeting to an export, or to its end."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

from gateway.errors import Refused
from gateway.nbd import protocol
from gateway.nbd.exports import Export, Exports
from gateway.nbd.protocol import BadOption, Handshake, Info, Option, Reply, Violation
from gateway.nbd.stream import receive, send
from providers.base import ProviderError

_MOST_OPTIONS = 64
_LATER = frozenset({"POOL_UNAVAILABLE", "POOL_TIMEOUT", "LIMIT_EXCEEDED"})


@dataclass
class Agreed:
    """What holds when the transmission begins."""

    export: Export
    structured: bool
    allocation: bool


class Negotiation:
    """One client's haggling: run() once."""

    def __init__(self, connection: socket.socket, exports: Exports, end: Callable[[], None]) -> None:
        """Take the connection; `end` is what Exports.attach() is to call."""
        self._connection = connection
        self._exports = exports
        self._end = end
        self._no_zeroes = False
        self._structured = False
        self._allocation_of: str | None = None
        self._content = b""

    def run(self) -> Agreed | None:
        """Return what was agreed, or None when the client leaves or asks in vain. Raises Violation, Gone, TimeoutError.

        The caller closes the export.
        """
        offered = Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES
        send(self._connection, protocol.GREETING + protocol.I_HAVE_OPTIONS + offered.to_bytes(2, "big"))
        flags = int.from_bytes(receive(self._connection, 4), "big")
        if flags & ~offered or not flags & Handshake.FIXED_NEWSTYLE:
            raise Violation("flags that were not offered, or an old client")
        self._no_zeroes = bool(flags & Handshake.NO_ZEROES)
        for _ in range(_MOST_OPTIONS):
            header = receive(self._connection, protocol.OPTION_HEADER.size)
            option, length = protocol.parse_option(header)
            self._content = receive(self._connection, length)
            if option == Option.ABORT:
                self._reply(option, Reply.ACK)
                return None
            if option == Option.EXPORT_NAME:
                return self._by_name()
            export = self._answer(option)
            if export:
                return self._agreed(export)
        raise Violation("too many options")

    def _answer(self, option: int) -> Export | None:
        """Answer one option; return the export that it chose."""
        try:
            if option in (Option.GO, Option.INFO):
                return self._go(option)
            if option in (Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT):
                self._contexts(option)
            elif option in (Option.LIST, Option.STRUCTURED_REPLY):
                self._plain(option)
            else:
                self._reply(option, Reply.ERR_UNSUP)
        except BadOption as error:
            self._reply(option, Reply.ERR_INVALID, str(error).encode())
        except (Refused, ProviderError) as error:
            self._reply(option, _refusal(error), str(error).encode()[: protocol.NAME_BYTES])
        return None

    def _plain(self, option: int) -> None:
        """Answer what has no content."""
        if self._content:
            raise BadOption("it has no content")
        if option == Option.LIST:
            for name in self._exports.names():
                self._reply(option, Reply.SERVER, protocol.server(name))
        else:
            self._structured = True
        self._reply(option, Reply.ACK)

    def _go(self, option: int) -> Export | None:
        name, wanted = protocol.parse_go(self._content)
        export = self._exports.attach(name, self._end)
        done = False
        try:
            self._reply(option, Reply.INFO, protocol.info_export(export.size_bytes))
            if Info.BLOCK_SIZE in wanted:
                self._reply(option, Reply.INFO, protocol.info_block_size())
            if Info.NAME in wanted:
                self._reply(option, Reply.INFO, protocol.info_name(name))
            self._reply(option, Reply.ACK)
            done = option == Option.GO
        finally:
            if not done:
                export.close()
        return export if done else None

    def _contexts(self, option: int) -> None:
        name, queries = protocol.parse_contexts(self._content)
        if not self._structured:
            raise BadOption("ask for structured replies first")
        listing = option == Option.LIST_META_CONTEXT
        self._exports.attach(name, self._end).close()  # an unknown export is an error here too
        wanted = protocol.wants_allocation(queries, listing=listing)
        if not listing:
            self._allocation_of = name if wanted else None
        if wanted:
            self._reply(option, Reply.META_CONTEXT, protocol.meta_context())
        self._reply(option, Reply.ACK)

    def _by_name(self) -> Agreed | None:
        """Answer EXPORT_NAME, whose only refusal is to hang up."""
        try:
            export = self._exports.attach(protocol.decoded_name(self._content), self._end)
        except (BadOption, Refused, ProviderError):
            return None
        try:
            send(
                self._connection,
                export.size_bytes.to_bytes(8, "big") + protocol.EXPORT_FLAGS.to_bytes(2, "big"),
                b"" if self._no_zeroes else bytes(124),
            )
        except BaseException:
            export.close()
            raise
        return self._agreed(export)

    def _agreed(self, export: Export) -> Agreed:
        return Agreed(export, self._structured, self._structured and self._allocation_of == export.name)

    def _reply(self, option: int, reply: int, content: bytes = b"") -> None:
        send(self._connection, protocol.option_reply(option, reply, content))


def _refusal(error: Refused | ProviderError) -> Reply:
    """Return the answer that tells a client whether to come back: ERR_PLATFORM for now, the others for good."""
    if error.reason in _LATER:
        return Reply.ERR_PLATFORM
    return Reply.ERR_POLICY if error.reason == "CAPABILITY_MISSING" else Reply.ERR_UNKNOWN
