"""What can be said of mounts without one: links that stay inside, LVM's text, frames from a hostile process."""

import contextlib
import socket
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clients.files import lvm, wire
from clients.mount.tree import confined
from clients.remote_blocks import PAGE_BYTES, _whole_pages
from frostgate.v1 import snapshot_provider_pb2 as rpc

PARTS = st.lists(st.sampled_from([b"..", b".", b"a", b"b", b""]), max_size=8)


@given(PARTS, st.integers(1, 5), st.booleans())
def test_no_link_leads_out_of_its_tree(parts: list[bytes], depth: int, absolute: bool) -> None:
    target = (b"/" if absolute else b"") + b"/".join(parts)
    confined_to = confined(target or b".", depth)
    assert not confined_to.startswith(b"/")
    kept = [part for part in confined_to.split(b"/") if part not in (b"", b".")]
    climbs = sum(part == b".." for part in kept)
    assert climbs <= depth - 1
    assert all(part == b".." for part in kept[:climbs])


@pytest.mark.parametrize(
    ("target", "depth", "shown"),
    [
        (b"/etc/passwd", 3, b"../../etc/passwd"),
        (b"../x", 2, b"../x"),
        (b"../../../x", 2, b"../x"),
        (b"plain", 1, b"plain"),
        (b"a/../../b", 2, b"../b"),
        (b"/", 1, b"."),
    ],
)
def test_links_are_shown_as_within_the_tree(target: bytes, depth: int, shown: bytes) -> None:
    assert confined(target, depth) == shown


@given(st.text(max_size=200))
def test_lvm_metadata_of_any_kind_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(lvm.Unreadable):
        lvm._parse(text)


@given(st.binary(min_size=4, max_size=64))
@example(b"\x83\x00\x00\x00\x00\x90\x00")  # a list as a key
def test_frames_from_a_hostile_parser_are_values_or_an_error(content: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">I", len(content)) + content)
        theirs.close()
        with contextlib.suppress(wire.Closed):
            wire.entry(wire.receive(ours))


def test_a_frame_longer_than_allowed_is_refused_before_it_is_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">I", wire.FRAME_BYTES + 1))
        with pytest.raises(wire.Closed):
            wire.receive(ours)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3 * PAGE_BYTES)), max_size=8))
def test_parts_come_as_whole_pages_with_the_same_bytes(shape: list[tuple[bool, int]]) -> None:
    parts, offset, content = [], 0, b""
    for number, (zeros, length) in enumerate(shape):
        data = b"" if zeros else bytes([number + 1]) * length
        part = rpc.ReadBlocksResponse(offset=offset)
        if zeros:
            part.zero_bytes = length
        else:
            part.data = data
        parts.append(part)
        content += data or bytes(length)
        offset += length
    got = b""
    for part in _whole_pages(iter(parts), 0, offset):
        assert part.offset == len(got)
        assert part.offset % PAGE_BYTES == 0
        got += part.data or bytes(part.zero_bytes)
    assert got == content
