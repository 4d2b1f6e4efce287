"""The user's side of the confined parser: starts it, asks it, starts it again when it died or did not answer."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import structlog

from clients.blocks import Blocks
from clients.files import wire

ANSWER_TIMEOUT_S = 60.0
_MOST_ALIVE = 32
_LONGEST_LINK = 4095
_LONGEST_NAME = 255
_STAND_IN = "\ufffd".encode()
T = TypeVar("T")
_log = structlog.get_logger()


class Parser:
    """The file systems on some disks. One request at a time; a lock sees to it.

    A parser that dies or hangs costs the request that it was at (OSError EIO); the next one meets a new parser. So
    does who comes back to one that was ended because others were wanted: no more than _MOST_ALIVE are kept.
    """

    def __init__(self, disks: Sequence[Blocks], passphrase: str | None = None) -> None:
        """Take the disks; the process is started by the first request."""
        self._disks = list(disks)
        self._passphrase = passphrase
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._request = ""
        self._closed = False
        self.lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process under way."""
        return self._process.pid if self._process else None

    def layout(self) -> list[wire.Tree]:
        """Return everything on the disks. Raises OSError EIO when the parser died of it."""
        return decoded(layout, self.ask("layout"))

    def root(self, tree: int) -> wire.Entry:
        """Return a tree's root directory; `tree` is a position in layout(). Raises OSError."""
        return decoded(wire.entry, self.ask("root", tree))

    def find(self, tree: int, number: int, name: bytes) -> wire.Entry | None:
        """Return the entry of a name in a directory, or None. Raises OSError."""
        return decoded(found_entry, self.ask("find", tree, number, name))

    def entries(self, tree: int, number: int) -> Iterator[tuple[bytes, wire.Entry | None]]:
        """Yield all entries of a directory. Raises OSError.

        An entry that is damaged is None; the others are there nevertheless.
        """
        start, complete = 0, False
        while not complete:
            some, complete = decoded(listed, self.ask("listing", tree, number, start))
            yield from some
            start += len(some)

    def read(self, tree: int, number: int, offset: int, length: int) -> bytes:
        """Return bytes of a file, fewer only at its end. Raises OSError."""
        parts = []
        while length > 0:
            part = decoded(partial(wire.content, most_bytes=length), self.ask("read", tree, number, offset, length))
            if not part:
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def link(self, tree: int, number: int) -> bytes:
        """Return a symbolic link's target as the guest wrote it. Raises OSError."""
        return decoded(target, self.ask("link", tree, number))

    def xattrs(self, tree: int, number: int) -> dict[bytes, bytes | None]:
        """Return a file's extended attributes, None for a value that cannot be read. Raises OSError."""
        return decoded(attributes, self.ask("xattrs", tree, number))

    def data(self, tree: int, number: int) -> list[tuple[int, int]]:
        """Return what is not a hole in a file as (offset, length). Raises OSError."""
        return decoded(ranges, self.ask("data", tree, number))

    def ask(self, *request: Any) -> Any:
        """Send a request and wait for its answer. Raises OSError."""
        with self.lock:
            self.begin(*request)
            return self.finish()

    def begin(self, *request: Any) -> socket.socket:
        """Send a request; `lock` is held. What is returned can be waited for: finish() takes the answer from it.

        Raises OSError.
        """
        self._request = str(request[0])
        if self._closed:
            raise OSError(errno.ESTALE, "the snapshot was closed")
        try:
            control = self._control or self._start()
            self._make_room()
            wire.send(control, list(request))
        except wire.Closed as error:
            raise self._died(error) from None
        return control

    def finish(self) -> Any:
        """Take the answer to begin(); `lock` is still held. Raises OSError."""
        if self._control is None:
            raise self._died(wire.Closed("it was ended"))
        try:
            code, answer = wire.receive(self._control)
        except (wire.Closed, TimeoutError, ValueError, TypeError) as error:
            raise self._died(error) from None
        if code:
            raise OSError(code if isinstance(code, int) else errno.EIO, str(answer))
        return answer

    def abandon(self) -> None:
        """End the process instead of finish(); `lock` is held."""
        self._end()

    def close(self) -> None:
        """End the process, for good; may be called twice."""
        with self.lock:
            self._closed = True
            self._end()

    def _make_room(self) -> None:
        """Be the one used last; end those that were not used for longest when there are too many."""
        with _alive_lock:
            _alive[self] = None
            _alive.move_to_end(self)
            if len(_alive) <= _MOST_ALIVE:
                return
            others = list(_alive)[: len(_alive) - _MOST_ALIVE]
        for other in others:
            if other.lock.acquire(blocking=False):
                try:
                    other._end()
                finally:
                    other.lock.release()

    def _died(self, error: Exception) -> OSError:
        self._end()
        _log.error("parser_died", request=self._request, error=str(error) or type(error).__name__)
        return OSError(errno.EIO, f"the parser of this file system died ({error})")

    def _start(self) -> socket.socket:
        control, theirs = socket.socketpair()
        blocks, asking = socket.socketpair()
        descriptors = [disk.descriptor() for disk in self._disks]
        local = [descriptor for descriptor in descriptors if descriptor is not None]
        command = [sys.executable, "-m", "clients.files.worker", str(theirs.fileno()), str(asking.fileno())]
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(), asking.fileno(), *local),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for us, who end it
                # no secrets in there, and nothing that would steer Python
                env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        finally:
            theirs.close()
            asking.close()
        control.settimeout(ANSWER_TIMEOUT_S)
        threading.Thread(target=_serve_blocks, args=(blocks, self._disks), daemon=True).start()
        self._control = control
        disks = [
            [disk.size_bytes, -1 if descriptor is None else descriptor]
            for disk, descriptor in zip(self._disks, descriptors, strict=True)
        ]
        wire.send(control, [disks, self._passphrase])
        return control

    def _end(self) -> None:
        with _alive_lock:
            _alive.pop(self, None)
        if self._control:
            self._control.close()
            self._control = None
        if self._process:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


_alive: OrderedDict[Parser, None] = OrderedDict()
_alive_lock = threading.Lock()


def _serve_blocks(asked: socket.socket, disks: Sequence[Blocks]) -> None:
    """Answer a parser's requests for bytes until it is gone. Its numbers are not trusted."""
    with asked:
        try:
            while True:
                number, offset, length = wire.receive(asked)
                if min(number, offset, length) < 0 or length > wire.FRAME_BYTES // 2:
                    return
                try:
                    answer: bytes | str = disks[number].read(offset, length)
                except OSError as error:
                    answer = str(error)
                wire.send(asked, answer)
        except (wire.Closed, ValueError, TypeError, IndexError):
            return


def decoded(decode: Callable[[Any], T], answer: Any) -> T:
    """Return what an answer says, by one of the functions below. Raises OSError EIO for one that says nothing."""
    try:
        return decode(answer)
    except (wire.Closed, TypeError, ValueError) as error:
        raise OSError(errno.EIO, f"the parser gave an impossible answer ({error})") from None


def found_entry(answer: Any) -> wire.Entry | None:
    """Decode the answer to "find"."""
    return None if answer is None else wire.entry(answer)


def listed(answer: Any) -> tuple[list[tuple[bytes, wire.Entry | None]], bool]:
    """Decode the answer to "listing": some entries, damaged ones as None, and whether they are the last."""
    entries, complete = answer
    return [_named(name, found) for name, found in entries], bool(complete) or not entries


def attributes(answer: Any) -> dict[bytes, bytes | None]:
    """Decode the answer to "xattrs"."""
    found = {_bytes(name): None if value is None else _bytes(value) for name, value in answer}
    return {name: value for name, value in found.items() if name and b"\0" not in name}


def target(answer: Any) -> bytes:
    """Decode the answer to "link"."""
    return _bytes(answer).split(b"\0")[0][:_LONGEST_LINK]


def layout(answer: Any) -> list[wire.Tree]:
    """Decode the answer to "layout"."""
    return [wire.tree(values) for values in answer]


def ranges(answer: Any) -> list[tuple[int, int]]:
    """Decode the answer to "data"."""
    return [(int(offset), int(length)) for offset, length in answer]


def contents(answer: Any) -> list[bytes | None]:
    """Decode the answer to "contents", the first of which is there."""
    first, *others = answer
    return [_bytes(first), *(None if other is None else _bytes(other) for other in others)]


def _bytes(value: Any) -> bytes:
    """Return what must be bytes: bytes() of a number would take as much memory as that says."""
    if not isinstance(value, bytes):
        raise wire.Closed("no bytes")
    return value


def _named(name: Any, values: Any) -> tuple[bytes, wire.Entry | None]:
    """Return an entry with a name that cannot lead out of its directory; one of another name counts as damaged."""
    name = _bytes(name)
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        _log.warning("impossible_name", name=repr(name[:_LONGEST_NAME]))
        return _STAND_IN + name.replace(b"/", _STAND_IN).replace(b"\0", _STAND_IN), None
    try:
        return name, found_entry(values)
    except wire.Closed:
        return name, None
