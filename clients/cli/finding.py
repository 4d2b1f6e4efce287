"""`frostgate find` and `diff`: everything below places in snapshots. What cannot be read is said; the rest is shown."""

from __future__ import annotations

import fnmatch
import json
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from clients.cli.files import Place, content, refusal, split
from clients.cli.mount import KeyFile, passphrase
from clients.cli.session import (
    FAILED,
    USAGE,
    AddressOption,
    OutputOption,
    Refusal,
    command,
    print_json,
    printable,
    session,
    warn,
)
from clients.files.snapshot import FileTree, OpenSnapshot, walk
from clients.files.wire import Entry

_WITHOUT_FILES = ("swap",)


class Kind(StrEnum):
    """Types of files, by find(1)'s letters."""

    FILE = "f"
    DIRECTORY = "d"
    LINK = "l"


_TYPES = {Kind.FILE: stat.S_IFREG, Kind.DIRECTORY: stat.S_IFDIR, Kind.LINK: stat.S_IFLNK}


@dataclass(frozen=True)
class Found:
    """A file by its path in a snapshot, VOLUME/PARTITION/PATH; `why_not` says why it, or what is in it, is not read."""

    path: bytes
    tree: FileTree
    entry: Entry | None
    why_not: str = ""


@command
def find(
    place: Place,
    name: Annotated[str, typer.Option(metavar="GLOB", help="Only names like this.")] = "*",
    kind: Annotated[Kind | None, typer.Option("--type", help="Only files, directories or links.")] = None,
    null: Annotated[bool, typer.Option("--print0", help="End each path with a NUL, as xargs -0 wants it.")] = False,
    key_file: KeyFile = None,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Print the paths of everything below a place; with --output json an object a line.

    What is damaged or cannot be read is said on standard error, and the exit code is 1 then.
    """
    snapshot_id, path = split(place)
    left_out = 0
    with session.gateway() as gateway, OpenSnapshot(gateway, snapshot_id, passphrase(key_file)) as opened:
        try:
            for found in below(opened, path):
                if found.entry is None:
                    left_out += 1
                    _say(found.path, found.why_not)
                    continue
                wanted = fnmatch.fnmatchcase(os.fsdecode(found.path.rsplit(b"/", 1)[-1]), name)
                if wanted and (kind is None or stat.S_IFMT(found.entry.mode) == _TYPES[kind]):
                    _print_path(found.path, found.entry, null)
        except OSError as error:
            raise refusal(error, place) from None
    if left_out:
        raise Refusal(f"{left_out} of what is there could not be read", FAILED)


@command
def diff(
    before: Annotated[str, typer.Argument(metavar="A[:VOLUME[/PARTITION[/PATH]]]", help="The older snapshot.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The newer snapshot; the same place in it is compared.")],
    contents: Annotated[
        bool, typer.Option("--contents", help="Compare bytes too, where size and times are the same.")
    ] = False,
    key_file: KeyFile = None,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Print which files changed between two snapshots: A added, D deleted, M modified (content or attributes).

    What is damaged or cannot be read in one of them is said on standard error, and the exit code is 1 then.
    """
    first_id, path = split(before)
    second_id, other = split(after)
    if other not in ("", path):
        raise Refusal(f"the same place is compared in both: name it once, as in {before} {second_id}", USAGE)
    key = passphrase(key_file)
    with (
        session.gateway() as gateway,
        OpenSnapshot(gateway, first_id, key) as first,
        OpenSnapshot(gateway, second_id, key) as second,
    ):
        try:
            comparison = Comparison(first, second, path, contents=contents)
        except OSError as error:
            raise refusal(error, before) from None
        changes = []
        for letter, where in comparison.changes():
            if session.json:
                changes.append({"change": letter, "path": os.fsdecode(where)})
            else:
                print(f"{letter} {printable(os.fsdecode(where))}")
    if session.json:
        print_json(changes)
    if comparison.left_out:
        raise Refusal(f"{comparison.left_out} of what is there could not be compared", FAILED)


class Comparison:
    """The same place in two snapshots; `left_out` counts what could not be read, which is said when it is met."""

    def __init__(self, first: OpenSnapshot, second: OpenSnapshot, path: str, *, contents: bool) -> None:
        """Read both. Raises OSError when there is no such place in one of them."""
        self._contents = contents
        self.left_out = 0
        self._old, self._lost_in_old = self._read(first, path)
        self._new, self._lost_in_new = self._read(second, path)

    def changes(self) -> Iterator[tuple[str, bytes]]:
        """Yield what changed as a letter and a path, in the order of paths."""
        for path in sorted(self._old.keys() | self._new.keys()):
            letter = self._difference(path)
            if letter:
                yield letter, path

    def _read(self, opened: OpenSnapshot, path: str) -> tuple[dict[bytes, tuple[FileTree, Entry]], set[bytes]]:
        """Return what is there, and the paths of what could not be read."""
        there: dict[bytes, tuple[FileTree, Entry]] = {}
        lost = set()
        try:
            for one in below(opened, path):
                if one.entry:
                    there[one.path] = one.tree, one.entry
                    continue
                lost.add(one.path)
                self._leave_out(f"{opened.group.id}:".encode() + one.path, one.why_not)
        except OSError as error:
            error.filename = f"{opened.group.id}:{path}"
            raise
        return there, lost

    def _difference(self, path: bytes) -> str:
        old, new = self._old.get(path), self._new.get(path)
        if old is None or new is None:
            # of what lies in something that cannot be read on the other side nothing is known
            lost = self._lost_in_old if old is None else self._lost_in_new
            unknown = any(place in lost for place in _with_its_parents(path))
            return "" if unknown else "A" if old is None else "D"
        if _told(old[1]) != _told(new[1]):
            return "M"
        if not self._contents or not stat.S_ISREG(old[1].mode):
            return ""
        try:
            return "" if all(a == b for a, b in zip(content(*old), content(*new), strict=True)) else "M"
        except OSError as error:
            self._leave_out(path, error.strerror or str(error))
            return ""

    def _leave_out(self, path: bytes, why: str) -> None:
        self.left_out += 1
        _say(path, why)


def below(opened: OpenSnapshot, path: str) -> Iterator[Found]:
    """Yield a file, or everything below a directory, a file system, a volume or a snapshot ("").

    What cannot be read comes without its entry; a directory of which that becomes known later comes a second time.
    Raises OSError when there is no such place, or when the file system that is named itself cannot be read.
    """
    if path and opened.disk_of(path)[1]:
        tree, entry, start = opened.find(path)
        volume = path.removesuffix(opened.disk_of(path)[1]).strip("/")
        yield from _of_tree(tree, entry, start, f"{volume}/{tree.tree.name}/".encode("utf-8", "surrogateescape"))
        return
    wanted = opened.disk_of(path)[0] if path else None
    for number, trees in enumerate(opened.trees()):
        for tree in trees if wanted in (None, number) else ():
            where = f"{opened.names[number]}/{tree.tree.name}".encode("utf-8", "surrogateescape")
            if tree.tree.kind in _WITHOUT_FILES:
                continue
            if tree.tree.why_not:
                yield Found(where, tree, None, " ".join(tree.tree.why_not.split()))
                continue
            try:
                root = tree.parser.root(tree.number)
            except OSError as error:
                yield Found(where, tree, None, error.strerror or str(error))
                continue
            yield from _of_tree(tree, root, b"", where + b"/")


def _of_tree(tree: FileTree, entry: Entry, start: bytes, prefix: bytes) -> Iterator[Found]:
    if not stat.S_ISDIR(entry.mode):
        yield Found(prefix + start, tree, entry)
        return
    try:
        for where, found in walk(tree, entry, start):
            yield Found(prefix + where, tree, found)
    except OSError as error:
        yield Found((prefix + start).rstrip(b"/"), tree, None, error.strerror or str(error))


def _with_its_parents(path: bytes) -> Iterator[bytes]:
    """Yield a path, and those of the directories that it lies in."""
    while path:
        yield path
        path = path.rpartition(b"/")[0]


def _told(entry: Entry) -> tuple[int, ...]:
    kept = (entry.mode, entry.uid, entry.gid)
    if stat.S_ISDIR(entry.mode):
        return kept  # what a directory has is told by its entries; reading it changes its times
    return (*kept, entry.links, entry.size_bytes, entry.mtime_ns, entry.ctime_ns)


def _say(where: bytes, why: str) -> None:
    place = os.fsdecode(where)
    warn({"damaged": place, "why": why}, f"damaged: {printable(place)}" + (f" ({printable(why)})" if why else ""))


def _print_path(path: bytes, entry: Entry, null: bool) -> None:
    if null:
        sys.stdout.buffer.write(path + b"\0")
    elif session.json:
        kind = stat.filemode(entry.mode)[0]
        print(json.dumps({"path": os.fsdecode(path), "type": kind, "size_bytes": entry.size_bytes}))
    else:
        print(printable(os.fsdecode(path)))
