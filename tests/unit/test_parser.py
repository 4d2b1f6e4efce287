"""A parser's user: what a hostile or hanging parser answers never becomes more than an error of one request."""

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.blocks import FileBlocks
from clients.files import parser, wire
from clients.files.parser import Parser
from clients.files.snapshot import FileTree
from clients.files.wire import Entry, Tree
from clients.mount.attributes import attributes_of
from clients.mount.tree import Inode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=8) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=13) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=30,
)
DECODERS: list[Callable[[Any], Any]] = [
    parser.found_entry,
    parser.listed,
    parser.attributes,
    parser.target,
    parser.layout,
    parser.ranges,
    parser.contents,
    wire.entry,
    partial(wire.content, most_bytes=100),
]
SMALL, LARGE, TIMES = (
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 63) - 1),
    st.integers(-(1 << 66), 1 << 68),
)


@settings(deadline=None)
@given(VALUES, st.sampled_from(DECODERS))
def test_any_answer_is_understood_or_an_io_error(answer: Any, decode: Callable[[Any], Any]) -> None:
    try:
        parser.decoded(decode, answer)
    except OSError as error:
        assert error.errno == errno.EIO  # noqa: PT017


@settings(max_examples=30, deadline=None)
@given(LARGE, SMALL, LARGE, TIMES, SMALL)
def test_whatever_an_entry_says_the_kernel_can_be_told(
    number: int, small: int, large: int, time_ns: int, device: int
) -> None:
    values = [number, small, small, small, small, large, large, time_ns, time_ns, time_ns, [device, small], True]
    with contextlib.suppress(wire.Closed):
        found = wire.entry(values)
        tree = FileTree(Parser([]), 0, Tree((0,), "whole", "ext"), "")
        trio.run(attributes_of, 1, Inode(tree, found, 1))


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Parser]:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    made = Parser([FileBlocks(os.open(image, os.O_RDONLY))])
    yield made
    made.close()


def test_a_parser_that_hangs_is_given_up_and_another_one_started(real: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [tree.kind for tree in real.layout()] == ["ext"]
    assert real._control
    real._control.settimeout(0.5)
    first = real.pid
    psutil.Process(first).suspend()
    with pytest.raises(OSError) as failed:
        real.root(0)
    assert failed.value.errno == errno.EIO
    assert not psutil.pid_exists(first or 0)
    assert {name for name, _ in real.entries(0, real.root(0).id)} == {b"lost+found"}
    assert real.pid != first


def test_a_parser_that_was_killed_costs_one_request(real: Parser) -> None:
    real.layout()
    psutil.Process(real.pid).kill()
    with pytest.raises(OSError):
        real.root(0)
    assert isinstance(real.root(0), Entry)


def test_a_question_that_no_tree_answers_is_an_error_and_not_an_end(real: Parser) -> None:
    real.layout()
    first = real.pid
    for ask in (
        lambda: real.root(7),
        lambda: real.read(0, 1 << 40, 0, 10),
        lambda: real.link(0, 2),
        lambda: real.ask("find", 0),
    ):
        with pytest.raises(OSError):
            ask()
    assert real.pid == first


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("answer", [1 << 35, [1 << 35], [[1 << 35, 1 << 35]], [[b"name", 1 << 35]]])
def test_a_number_where_bytes_belong_takes_no_memory(decode: Callable[[Any], Any], answer: Any) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (1 << 30), limits[1]))
    try:
        with contextlib.suppress(OSError):
            parser.decoded(decode, answer)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_an_impossible_name_costs_that_name_only() -> None:
    entry = wire.pack(Entry(12, 0o100644, 1, 0, 0, 5, 5, 0, 0, 0))
    answer = [[[b"before", entry], [b"../etc/passwd", entry], [b"", entry], [b"a\0b", entry], [b"after", entry]], True]
    (first, *others, last), complete = parser.decoded(parser.listed, answer)
    assert complete
    assert (first[0], last[0]) == (b"before", b"after")
    assert first[1] == last[1]
    assert [found for _, found in others] == [None, None, None]
    assert all(name and b"/" not in name and b"\0" not in name for name, _ in others)
