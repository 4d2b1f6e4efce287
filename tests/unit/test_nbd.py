"""NBD without a storage: what is taken apart, what any bytes on the wire lead to, what holes become."""

import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients import nbd
from clients.patience import Away
from gateway.errors import Refused
from gateway.nbd import protocol
from gateway.nbd.exports import allocation
from gateway.nbd.negotiation import Agreed, Negotiation
from gateway.nbd.protocol import BadOption, Violation
from gateway.nbd.server import socket_beside
from gateway.nbd.stream import Gone, set_timeouts
from gateway.nbd.transmission import transmit
from providers.base import Extent

SIZE = 1000
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50)


class FakeExport:
    """SIZE bytes that count up."""

    name = "a/b/c"
    size_bytes = SIZE

    def __init__(self) -> None:
        self.closed = False

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= SIZE
        return bytes(position % 251 for position in range(offset, offset + length))

    def status(self, offset: int, length: int, most: int) -> list[tuple[int, int]]:
        assert 0 <= offset < offset + length <= SIZE
        return [(length, 0)]

    def release(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class FakeExports:
    """One export, and whether those that were given have come back."""

    def __init__(self) -> None:
        self.given: list[FakeExport] = []

    def attach(self, name: str, end: object) -> FakeExport:
        if name != FakeExport.name:
            raise Refused("GROUP_SNAPSHOT_NOT_FOUND", "there is none")
        self.given.append(FakeExport())
        return self.given[-1]

    def names(self) -> Iterator[str]:
        yield FakeExport.name


def converse(said: bytes) -> FakeExports:
    """What the server makes of a client that says this and hangs up; any other error than these is a fault."""
    exports = FakeExports()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        set_timeouts(ours, 5, 5)
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        with suppress(Violation, Gone, TimeoutError):
            agreed = Negotiation(ours, exports, lambda: None).run()  # type: ignore[arg-type]
            if agreed:
                try:
                    transmit(ours, agreed, lambda: False)
                finally:
                    agreed.export.close()
    return exports


def option(number: int, content: bytes) -> bytes:
    return protocol.OPTION_HEADER.pack(b"IHAVEOPT", number, len(content)) + content


def named(name: str) -> bytes:
    return struct.pack(">I", len(name.encode())) + name.encode()


OPTIONS = st.builds(
    option,
    st.integers(0, 12),
    st.one_of(st.binary(max_size=80), st.just(named(FakeExport.name) + b"\0\0"), st.just(named("no") + b"\0\0\0\0")),
)
REQUESTS = st.builds(
    protocol.REQUEST_HEADER.pack,
    st.just(0x25609513),
    st.integers(0, 0xFFFF),
    st.integers(0, 9),
    st.integers(0, 2**64 - 1),
    st.one_of(st.integers(0, SIZE + 1), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, SIZE + 1), st.integers(0, 2**32 - 1)),
)


@given(st.lists(OPTIONS, max_size=5), st.binary(max_size=100))
def test_any_haggling_ends_well_and_gives_back_what_it_was_lent(options: list[bytes], rest: bytes) -> None:
    assert all(export.closed for export in converse(b"\0\0\0\3" + b"".join(options) + rest).given)


@given(st.binary(max_size=200))
def test_any_first_words_end_well(said: bytes) -> None:
    assert all(export.closed for export in converse(said).given)


@given(st.lists(REQUESTS, max_size=5), st.booleans(), st.binary(max_size=60))
def test_any_requests_end_well(requests: list[bytes], structured: bool, rest: bytes) -> None:
    begin = option(8, b"") if structured else b""
    context = option(10, named(FakeExport.name) + struct.pack(">II", 1, 15) + b"base:allocation")
    go = option(7, named(FakeExport.name) + b"\0\0")
    exports = converse(b"\0\0\0\3" + begin + context + go + b"".join(requests) + rest)
    assert exports.given
    assert all(export.closed for export in exports.given)


@given(st.binary(max_size=100))
def test_options_are_read_or_refused(content: bytes) -> None:
    with suppress(BadOption):
        name, wanted = protocol.parse_go(content)
        assert content == named(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)
    with suppress(BadOption):
        name, queries = protocol.parse_contexts(content)
        again = b"".join(struct.pack(">I", len(query)) + query for query in queries)
        assert content == named(name) + struct.pack(">I", len(queries)) + again


@given(NAMES, st.lists(st.integers(0, 0xFFFF), max_size=5))
def test_what_is_said_is_understood(name: str, wanted: list[int]) -> None:
    content = named(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)
    assert protocol.parse_go(content) == (name, wanted)


def test_a_deleted_or_unknown_export_is_unknown() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        set_timeouts(ours, 5, 5)
        theirs.sendall(b"\0\0\0\3" + option(7, named("gone/b/c") + b"\0\0"))
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(Gone):
            Negotiation(ours, FakeExports(), lambda: None).run()  # type: ignore[arg-type]
        ours.close()
        told = theirs.recv(1000)
    assert struct.unpack_from(">QII", told, 18)[1:] == (7, protocol.Reply.ERR_UNKNOWN)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=20), st.integers(0, 50))
def test_holes_and_data_cover_the_range(pieces: list[tuple[int, int]], tail: int) -> None:
    offset = position = 7
    extents, expected = [], ""
    for hole, data in pieces:
        extents.append(Extent(position + hole, data))
        position += hole + data
        expected += "h" * hole + "d" * data
    expected += "h" * tail
    found = allocation(extents, offset, position + tail)
    assert "".join(("h" if state else "d") * length for length, state in found) == expected
    assert all(first[1] != second[1] for first, second in pairwise(found))


def test_the_exports_socket_lies_beside_the_gateways() -> None:
    assert socket_beside(Path("/run/frostgate/frostgate.sock")) == Path("/run/frostgate/frostgate.nbd.sock")
    assert socket_beside(Path("/run/frostgate/socket")) == Path("/run/frostgate/socket.nbd")


def test_addresses_are_taken_apart_and_others_refused() -> None:
    assert nbd.parse_uri("nbd+unix:///a/b/c%20d?socket=/x%20y") == ("/x y", "a/b/c d")
    for wrong in ("nbd://host/a", "nbd+unix:///a", "http://x/?socket=/a", ""):
        with pytest.raises(ValueError, match="no NBD export"):
            nbd.parse_uri(wrong)


@settings(max_examples=25)
@given(st.binary(max_size=300), st.booleans())
def test_a_server_that_is_none_of_ours_is_an_error_and_no_hang(said: bytes, polite: bool) -> None:
    greeting = b"NBDMAGICIHAVEOPT\0\3" if polite else b""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{directory}/s")
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(greeting + said)
                connection.shutdown(socket.SHUT_WR)
                with suppress(ConnectionResetError):
                    while connection.recv(1000):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        with suppress(Away, OSError):
            connection = nbd.Connection(f"{directory}/s", "a/b/c")
            connection.close()
        thread.join()


@given(st.binary(max_size=120), st.integers(1, 64))
def test_answers_are_whole_or_an_error(said: bytes, length: int) -> None:
    ours, theirs = socket.socketpair()
    connection = nbd.Connection.__new__(nbd.Connection)
    connection._socket, connection._cookie = ours, 0
    with theirs:
        connection.ask(0, length)
        # a right head makes the rest of it matter
        head = struct.pack(">IHHQ", 0x668E33EF, said[0] % 2 if said else 0, said[-1] % 7 if said else 0, 1)
        theirs.sendall(head + said)
        theirs.shutdown(socket.SHUT_WR)
        with suppress(Away):
            assert len(connection.answer()) == length
        connection.close()


def test_the_server_and_our_client_understand_each_other() -> None:
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{directory}/s")
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                agreed = Negotiation(connection, FakeExports(), lambda: None).run()  # type: ignore[arg-type]
                assert isinstance(agreed, Agreed)
                transmit(connection, agreed, lambda: False)

        thread = threading.Thread(target=serve)
        thread.start()
        connection = nbd.Connection(f"{directory}/s", FakeExport.name)
        assert connection.size_bytes == SIZE
        connection.ask(10, 900)
        assert connection.answer() == FakeExport().read(10, 900)
        assert connection.status(3, 20) == [(20, False)]
        connection.ask(0, SIZE + 1)
        with pytest.raises(Away, match="not a range"):
            connection.answer()
        connection.close()
        thread.join()
