"""The confined process that parses file systems: `python -m clients.files.worker`, started by clients.files.parser.

It gets its disks as open read-only files, or asks its parent for their bytes; answers one request after the other;
ends with its parent. The first message is the set-up: [[size, descriptor or -1] a disk, passphrase or None].
"""

from __future__ import annotations

import errno
import signal
import socket
import sys
from itertools import islice
from typing import Any

import msgpack  # noqa: F401  loaded before confine(), as everything below is

from clients.files import ext_attributes, sandbox, volumes, wire
from clients.files.ranges import AskedDisk, Bytes, LocalDisk

ANSWER_S = 90.0
LIST_ENTRIES = 2000
_DATA_RANGES = 200_000


class Trees:
    """The trees of the disks, opened when asked for."""

    def __init__(self, disks: list[Bytes], passphrase: str | None) -> None:
        """Take the disks; nothing is read yet."""
        self._disks = disks
        self._passphrase = passphrase
        self._found: list[volumes.Found] | None = None
        self._open: dict[int, volumes.AnyTree] = {}

    def layout(self) -> list[Any]:
        """Return every Tree."""
        return [wire.pack(found.tree) for found in self._scanned()]

    def root(self, tree: int) -> Any:
        """Return a tree's root directory."""
        opened = self._tree(tree)
        return wire.pack(opened.entry(opened.root_id))

    def entry(self, tree: int, number: int) -> Any:
        """Return one entry."""
        return wire.pack(self._tree(tree).entry(number))

    def find(self, tree: int, number: int, name: bytes) -> Any:
        """Return the entry of a name in a directory, or None."""
        opened = self._tree(tree)
        child = opened.names(number).get(name)
        return None if child is None else wire.pack(opened.entry(child))

    def listing(self, tree: int, number: int, start: int) -> Any:
        """Return at most LIST_ENTRIES [name, entry] from a position on, and whether these are the last.

        An entry that cannot be read is None.
        """
        opened = self._tree(tree)
        names = opened.names(number)
        chosen = islice(names.items(), start, start + LIST_ENTRIES)
        return [[name, _entry_or_none(opened, child)] for name, child in chosen], start + LIST_ENTRIES >= len(names)

    def read(self, tree: int, number: int, offset: int, length: int) -> Any:
        """Return bytes of a file, at most wire.READ_BYTES."""
        return wire.pack_content(self._tree(tree).read(number, offset, min(length, wire.READ_BYTES)))

    def contents(self, tree: int, numbers: list[int]) -> Any:
        """Return the contents of small files; of those after the first, None where one cannot be read."""
        opened = self._tree(tree)
        first, *others = numbers
        return [opened.read(first, 0, wire.READ_BYTES), *(_content_or_none(opened, number) for number in others)]

    def link(self, tree: int, number: int) -> bytes:
        """Return a symbolic link's target."""
        return self._tree(tree).link(number)

    def xattrs(self, tree: int, number: int) -> Any:
        """Return the extended attributes."""
        return self._tree(tree).xattrs(number)

    def data(self, tree: int, number: int) -> Any:
        """Return what is not a hole."""
        ranges = []
        for one in self._tree(tree).data(number):
            ranges.append(one)
            if len(ranges) > _DATA_RANGES:
                raise OSError(errno.EFBIG, "too many ranges")
        return ranges

    def _scanned(self) -> list[volumes.Found]:
        if self._found is None:
            self._found = volumes.scan(self._disks, self._passphrase)
        return self._found

    def _tree(self, number: int) -> volumes.AnyTree:
        if number not in self._open:
            opener = self._scanned()[number].open
            if opener is None:
                raise OSError(errno.EIO, "not readable")
            self._open[number] = opener()
        return self._open[number]


_CALLS = ("layout", "root", "entry", "find", "listing", "read", "contents", "link", "xattrs", "data")


def _entry_or_none(tree: volumes.AnyTree, number: int) -> Any:
    try:
        return wire.pack(tree.entry(number))
    except OSError:
        return None


def _content_or_none(tree: volumes.AnyTree, number: int) -> bytes | None:
    try:
        return tree.read(number, 0, wire.READ_BYTES)
    except OSError:
        return None  # said when it is asked for itself


def serve(control: socket.socket, trees: Trees) -> None:
    """Answer until the other side is gone."""
    calls = {name: getattr(trees, name) for name in _CALLS}
    while True:
        name, *arguments = wire.receive(control)
        # an endless loop in a library ends us, also when nobody is there any more to do it
        signal.setitimer(signal.ITIMER_REAL, ANSWER_S)
        try:
            answer = [0, calls[name](*arguments)]
        except Exception as error:
            # whatever a library says of a damaged structure: the user of the parser logs it
            answer = [getattr(error, "errno", None) or errno.EIO, str(error)[:500] or type(error).__name__]
        signal.setitimer(signal.ITIMER_REAL, 0)
        wire.send(control, answer)


def main() -> None:
    """Confine this process, then serve."""
    control = socket.socket(fileno=int(sys.argv[1]))
    asked = socket.socket(fileno=int(sys.argv[2]))
    # what is imported lazily cannot be opened any more afterwards
    import encodings.idna
    import encodings.utf_16_le  # noqa: F401

    import pyfsext  # noqa: F401
    import pyfsfat  # noqa: F401
    import pyfsntfs  # noqa: F401
    import pyfsxfs  # noqa: F401
    import pyluksde  # noqa: F401
    import pytsk3  # noqa: F401
    import pyvsgpt  # noqa: F401

    ext_attributes.load()
    sandbox.confine()
    try:
        disks, passphrase = wire.receive(control)
        sources: list[Bytes] = [
            LocalDisk(descriptor, size) if descriptor >= 0 else AskedDisk(number, size, asked)
            for number, (size, descriptor) in enumerate(disks)
        ]
        serve(control, Trees(sources, passphrase))
    except wire.Closed:
        return


if __name__ == "__main__":
    main()
