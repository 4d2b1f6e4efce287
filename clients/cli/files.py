"""`frostgate ls`, `cat`, `find` and `diff`: the files in snapshots, without mounting them."""

from __future__ import annotations

import fnmatch
import os
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer

from clients.cli import tables
from clients.cli.mount import KeyFile, passphrase
from clients.cli.session import (
    FAILED,
    NOT_FOUND,
    REFUSED,
    USAGE,
    AddressOption,
    OutputOption,
    Refusal,
    command,
    print_json,
    printable,
    session,
)
from clients.files.snapshot import FileTree, OpenSnapshot, walk
from clients.files.wire import Entry

_READ_BYTES = 1024 * 1024
Place = Annotated[
    str,
    typer.Argument(
        metavar="SNAPSHOT[:VOLUME[/PARTITION[/PATH]]]",
        help='Where; PARTITION is as `frostgate ls SNAPSHOT` shows it: p1, VG-LV, or "whole".',
    ),
]


class Kind(StrEnum):
    """Types of files, by find(1)'s letters."""

    FILE = "f"
    DIRECTORY = "d"
    LINK = "l"


_TYPES = {Kind.FILE: stat.S_IFREG, Kind.DIRECTORY: stat.S_IFDIR, Kind.LINK: stat.S_IFLNK}


@command
def ls(place: Place, key_file: KeyFile = None, output: OutputOption = None, address: AddressOption = None) -> None:
    """List a snapshot's volumes and partitions, or a directory in it."""
    snapshot_id, path = split(place)
    with session.gateway() as gateway, OpenSnapshot(gateway, snapshot_id, passphrase(key_file)) as opened:
        try:
            if path.strip("/").count("/") == 0 and (not path or not opened.disk_of(path)[1]):
                _show_trees(opened, path)
                return
            tree, entry, _ = opened.find(path)
            if stat.S_ISDIR(entry.mode):
                rows = sorted(tree.parser.entries(tree.number, entry.id), key=lambda one: one[0])
            else:
                rows = [(os.fsencode(path.rsplit("/", 1)[-1]), entry)]
            _show_entries(tree, rows)
        except OSError as error:
            raise refusal(error) from None


@command
def cat(
    place: Annotated[str, typer.Argument(metavar="SNAPSHOT:VOLUME/PARTITION/PATH", help="A file.")],
    key_file: KeyFile = None,
    address: AddressOption = None,
) -> None:
    """Write a file's content to standard output."""
    snapshot_id, path = split(place)
    with session.gateway() as gateway, OpenSnapshot(gateway, snapshot_id, passphrase(key_file)) as opened:
        try:
            tree, entry, _ = opened.find(path)
            if not stat.S_ISREG(entry.mode):
                raise Refusal(f"{path} is not a file", REFUSED)
            for part in content(tree, entry):
                sys.stdout.buffer.write(part)
            sys.stdout.buffer.flush()
        except OSError as error:
            raise refusal(error) from None


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
    """Print the paths of everything below a place; exit code 1 when something there was damaged."""
    snapshot_id, path = split(place)
    damaged = 0
    with session.gateway() as gateway, OpenSnapshot(gateway, snapshot_id, passphrase(key_file)) as opened:
        try:
            for tree, start, entry, prefix in _places(opened, path):
                for where, found in _at_or_below(tree, entry, start):
                    if found is None:
                        damaged += 1
                        print(f"damaged: {printable(os.fsdecode(prefix + where))}", file=sys.stderr)
                        continue
                    wanted = fnmatch.fnmatchcase(os.fsdecode(where.rsplit(b"/", 1)[-1]), name)
                    if wanted and (kind is None or stat.S_IFMT(found.mode) == _TYPES[kind]):
                        _print_path(prefix + where, found, null)
        except OSError as error:
            raise refusal(error) from None
    if damaged:
        raise Refusal(f"{damaged} entries could not be read", FAILED)


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
    """Print which files changed between two snapshots: A added, D deleted, M modified (content or attributes)."""
    first_id, path = split(before)
    second_id, other = split(after)
    key = passphrase(key_file)
    changes = []
    with (
        session.gateway() as gateway,
        OpenSnapshot(gateway, first_id, key) as first,
        OpenSnapshot(gateway, second_id, key) as second,
    ):
        try:
            old = _everything(first, path)
            new = _everything(second, other or path)
            for where in sorted(old.keys() | new.keys()):
                letter = _difference(old.get(where), new.get(where), contents=contents)
                if letter and session.json:
                    changes.append({"change": letter, "path": os.fsdecode(where)})
                elif letter:
                    print(f"{letter} {printable(os.fsdecode(where))}")
        except OSError as error:
            raise refusal(error) from None
    if session.json:
        print_json(changes)


def split(place: str) -> tuple[str, str]:
    """Return the snapshot and the path of SNAPSHOT[:PATH]. Raises Refusal."""
    snapshot_id, _, path = place.partition(":")
    if not snapshot_id:
        raise Refusal(f"{place!r}: name a snapshot, as in SNAPSHOT:VOLUME/PARTITION/PATH", USAGE)
    return snapshot_id, path.strip("/")


def refusal(error: OSError) -> Exception:
    """Return an error of a place in a snapshot in words; a broken pipe as it is, for command()."""
    if isinstance(error, BrokenPipeError):
        return error
    where = f"{error.filename}: " if error.filename else ""
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return Refusal(f"{where}{error.strerror or error}", NOT_FOUND if missing else FAILED)


def content(tree: FileTree, entry: Entry) -> Iterator[bytes]:
    """Yield a file's bytes. Raises OSError EIO when there are fewer than its size."""
    offset = 0
    while offset < entry.size_bytes:
        part = tree.parser.read(tree.number, entry.id, offset, _READ_BYTES)
        if not part:
            raise OSError(5, f"ends after {offset} of {entry.size_bytes} bytes")
        yield part
        offset += len(part)


def _places(opened: OpenSnapshot, path: str) -> Iterator[tuple[FileTree, bytes, Entry, bytes]]:
    """Yield what a path names, a snapshot and a volume being all of their trees; with the path's prefix."""
    if path and opened.disk_of(path)[1]:
        tree, entry, start = opened.find(path)
        prefix = path.encode("utf-8", "surrogateescape")
        prefix = prefix[: len(prefix) - len(start)].rstrip(b"/") + b"/"
        yield tree, start, entry, prefix
        return
    wanted = opened.disk_of(path)[0] if path else None
    for number, trees in enumerate(opened.trees()):
        for tree in trees:
            if wanted in (None, number) and not tree.tree.why_not:
                prefix = f"{opened.names[number]}/{tree.tree.name}/".encode()
                yield tree, b"", tree.parser.root(tree.number), prefix


def _at_or_below(tree: FileTree, entry: Entry, start: bytes) -> Iterator[tuple[bytes, Entry | None]]:
    """Yield a file itself, or everything below a directory. Raises OSError."""
    return walk(tree, entry, start) if stat.S_ISDIR(entry.mode) else iter([(start, entry)])


def _everything(opened: OpenSnapshot, path: str) -> dict[bytes, tuple[FileTree, Entry | None]]:
    return {
        prefix + where: (tree, found)
        for tree, start, entry, prefix in _places(opened, path)
        for where, found in _at_or_below(tree, entry, start)
    }


def _difference(
    old: tuple[FileTree, Entry | None] | None, new: tuple[FileTree, Entry | None] | None, *, contents: bool
) -> str:
    if old is None or new is None:
        return "A" if old is None else "D"
    (old_tree, before), (new_tree, after) = old, new
    if before is None or after is None:
        return "" if before is after else "M"
    if stat.S_ISDIR(before.mode) and stat.S_ISDIR(after.mode):
        # what a directory has is told by its entries; reading it changes its times
        same = _kept(before)[:3] == _kept(after)[:3]
    else:
        same = (_kept(before), before.size_bytes, before.mtime_ns, before.ctime_ns) == (
            _kept(after),
            after.size_bytes,
            after.mtime_ns,
            after.ctime_ns,
        )
    if same and contents and stat.S_ISREG(before.mode):
        same = all(a == b for a, b in zip(content(old_tree, before), content(new_tree, after), strict=True))
    return "" if same else "M"


def _kept(entry: Entry) -> tuple[int, int, int, int]:
    return entry.mode, entry.uid, entry.gid, entry.links


def _show_trees(opened: OpenSnapshot, path: str) -> None:
    wanted = opened.disk_of(path)[0] if path else None
    rows = [
        (opened.names[number], one)
        for number, trees in enumerate(opened.trees())
        for one in trees
        if wanted in (None, number)
    ]
    if session.json:
        print_json(
            [
                {
                    "volume": name,
                    "partition": one.tree.name,
                    "filesystem": one.tree.kind,
                    "label": one.tree.label,
                    "note": one.note,
                    "why_not": one.tree.why_not,
                }
                for name, one in rows
            ]
        )
        return
    tables.show(
        ("VOLUME", "PARTITION", "FILE SYSTEM", "LABEL", "READABLE"),
        (
            (name, one.tree.name, one.tree.kind, one.tree.label, "no" if one.tree.why_not else "yes")
            for name, one in rows
        ),
    )
    for name, one in rows:
        said = one.tree.why_not or one.note
        if said:
            print(f"{name}/{one.tree.name}: {printable(said.strip())}", file=sys.stderr)


def _show_entries(tree: FileTree, rows: list[tuple[bytes, Entry | None]]) -> None:
    if session.json:
        print_json([_plain(tree, name, entry) for name, entry in rows])
        return
    for name, entry in rows:
        shown = printable(os.fsdecode(name))
        if entry is None:
            print(f"{'damaged':>49} {shown}")
            continue
        when = datetime.fromtimestamp(entry.mtime_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M")
        if stat.S_ISLNK(entry.mode):
            shown += " -> " + printable(os.fsdecode(tree.parser.link(tree.number, entry.id)))
        mode = stat.filemode(entry.mode)
        print(f"{mode} {entry.links:>3} {entry.uid:>5} {entry.gid:>5} {entry.size_bytes:>12} {when} {shown}")


def _plain(tree: FileTree, name: bytes, entry: Entry | None) -> dict[str, object]:
    if entry is None:
        return {"name": os.fsdecode(name), "damaged": True}
    found: dict[str, object] = {
        "name": os.fsdecode(name),
        "mode": stat.filemode(entry.mode),
        "links": entry.links,
        "uid": entry.uid,
        "gid": entry.gid,
        "size_bytes": entry.size_bytes,
        "mtime": datetime.fromtimestamp(entry.mtime_ns / 1e9, UTC).isoformat(),
    }
    if stat.S_ISLNK(entry.mode):
        found["target"] = os.fsdecode(tree.parser.link(tree.number, entry.id))
    return found


def _print_path(path: bytes, entry: Entry, null: bool) -> None:
    if null:
        sys.stdout.buffer.write(path + b"\0")
    elif session.json:
        print(
            f'{{"path": {_quoted(path)}, "type": "{stat.filemode(entry.mode)[0]}", "size_bytes": {entry.size_bytes}}}'
        )
    else:
        print(printable(os.fsdecode(path)))


def _quoted(path: bytes) -> str:
    import json

    return json.dumps(os.fsdecode(path))
