"""`frostgate ls` and `cat`: the files in snapshots, without mounting them."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from clients.cli import tables
from clients.cli.mount import KeyFile, passphrase
from clients.cli.session import (
    FAILED,
    NO_RIGHT,
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
from clients.files.snapshot import FileTree, NoSuchPlace, OpenSnapshot
from clients.files.wire import Entry

_READ_BYTES = 1024 * 1024
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CODES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS), REFUSED),
    **dict.fromkeys((errno.EACCES, errno.EPERM), NO_RIGHT),
}
Place = Annotated[
    str,
    typer.Argument(
        metavar="SNAPSHOT[:VOLUME[/PARTITION[/PATH]]]",
        help='Where; PARTITION is as `frostgate ls SNAPSHOT` shows it: p1, VG-LV, or "whole".',
    ),
]


@command
def ls(place: Place, key_file: KeyFile = None, output: OutputOption = None, address: AddressOption = None) -> None:
    """List a snapshot's volumes and partitions, or a directory in it."""
    snapshot_id, path = split(place)
    with session.gateway() as gateway, OpenSnapshot(gateway, snapshot_id, passphrase(key_file)) as opened:
        try:
            if not path or not opened.disk_of(path)[1]:
                _show_trees(opened, path)
                return
            tree, entry, _ = opened.find(path)
            if stat.S_ISDIR(entry.mode):
                rows = sorted(tree.parser.entries(tree.number, entry.id), key=lambda one: one[0])
            else:
                rows = [(os.fsencode(path.rsplit("/", 1)[-1]), entry)]
            _show_entries(tree, rows)
        except OSError as error:
            raise refusal(error, place) from None


@command
def cat(
    place: Annotated[str, typer.Argument(metavar="SNAPSHOT:VOLUME/PARTITION/PATH", help="A file.")],
    key_file: KeyFile = None,
    output: OutputOption = None,
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
            raise refusal(error, place) from None


def split(place: str) -> tuple[str, str]:
    """Return the snapshot and the path of SNAPSHOT[:PATH]. Raises Refusal."""
    snapshot_id, _, path = place.partition(":")
    if not snapshot_id:
        raise Refusal(f"{place!r}: name a snapshot, as in SNAPSHOT:VOLUME/PARTITION/PATH", USAGE)
    return snapshot_id, path.strip("/")


def refusal(error: OSError, place: str = "") -> Exception:
    """Return an error of a place in a snapshot in words; a broken pipe as it is, for command().

    The place is named unless the error itself does. What is no place in a snapshot (a full disk, a missing directory)
    has another exit code.
    """
    if isinstance(error, BrokenPipeError):
        return error
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else place
    code = NOT_FOUND if isinstance(error, NoSuchPlace) else _CODES.get(error.errno or 0, FAILED)
    said = error.strerror or str(error)
    return Refusal(f"{where}: {said}" if where else said, code)


def content(tree: FileTree, entry: Entry) -> Iterator[bytes]:
    """Yield a file's bytes. Raises OSError EIO when there are fewer than its size."""
    offset = 0
    while offset < entry.size_bytes:
        part = tree.parser.read(tree.number, entry.id, offset, _READ_BYTES)
        if not part:
            raise OSError(errno.EIO, f"ends after {offset} of {entry.size_bytes} bytes")
        yield part
        offset += len(part)


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
            print(f"{name}/{one.tree.name}: {printable(' '.join(said.split()))}", file=sys.stderr)


def _show_entries(tree: FileTree, rows: list[tuple[bytes, Entry | None]]) -> None:
    if session.json:
        print_json([_plain(tree, name, entry) for name, entry in rows])
        return
    for name, entry in rows:
        shown = printable(os.fsdecode(name))
        if entry is None:
            print(f"{'damaged':>49} {shown}")
            continue
        when = _modified(entry).strftime("%Y-%m-%d %H:%M")
        if stat.S_ISLNK(entry.mode):
            shown += " -> " + printable(_target(tree, entry) or "damaged")
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
        "mtime": _modified(entry).isoformat(),
    }
    if stat.S_ISLNK(entry.mode):
        found["target"] = _target(tree, entry)
    return found


def _target(tree: FileTree, entry: Entry) -> str | None:
    try:
        return os.fsdecode(tree.parser.link(tree.number, entry.id))
    except OSError:
        return None  # shown as that; the link itself is there


def _modified(entry: Entry) -> datetime:
    return _EPOCH + timedelta(microseconds=entry.mtime_ns // 1000)
