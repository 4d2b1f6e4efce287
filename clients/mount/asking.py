"""Asking what may take a while, from the event loop: a parser, or a thread; errors become FUSE's."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, TypeVar

import pyfuse3
import structlog
import trio

from clients.files.parser import ANSWER_TIMEOUT_S, decoded
from clients.files.snapshot import FileTree
from clients.mount.waiting import waiting

T = TypeVar("T")
_log = structlog.get_logger()


async def ask(tree: FileTree, decode: Callable[[Any], T], call: str, *arguments: Any) -> T:
    """Ask a parser without a thread in between: what `find` and `tar` do thousands of times. Raises FUSEError."""
    parser = tree.parser
    if not parser.lock.acquire(blocking=False):
        with waiting.elsewhere():
            await trio.to_thread.run_sync(parser.lock.acquire)
    try:
        control = parser.begin(call, tree.number, *arguments)
        answered = False
        try:
            with trio.move_on_after(ANSWER_TIMEOUT_S):
                await waiting.for_answer(control)
                answered = True
        finally:
            if not answered:
                parser.abandon()
        return decoded(decode, parser.finish())
    except OSError as error:
        _log.warning("unreadable", partition=tree.tree.name, request=call, error=error.strerror)
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
    finally:
        parser.lock.release()


async def in_thread(work: Callable[[], T]) -> T:
    """Do what may block in a thread; its errors become FUSE's. Raises FUSEError."""
    with waiting.elsewhere():
        return await trio.to_thread.run_sync(lambda: told(work))


def told(work: Callable[[], T]) -> T:
    """Do something; its errors become FUSE's. Raises FUSEError."""
    try:
        return work()
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
