"""`frostgate restore`: files and trees out of a snapshot, to this host or into a running guest."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from clients.cli import tables
from clients.cli.files import content, refusal, split
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
from clients.files.snapshot import FileTree, OpenSnapshot
from clients.files.wire import Entry
from clients.restore.copying import NO_ROOM, Outcome, Restore, total
from clients.restore.dressing import Wishes
from clients.restore.guest import GuestRefused, NoSuchVm, put

_LEFT_OUT = {
    "set_id_bits": "set-user-id or set-group-id bits",
    "attributes": "attributes that give rights",
    "devices": "device nodes",
    "sockets": "sockets",
    "access_lists": "access lists",
}
_IN_THE_WAY = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EBUSY)


@command
def restore(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="SNAPSHOT:VOLUME/PARTITION/PATH... DEST[/]", help="What, all of one snapshot, and whereto."
        ),
    ],
    into_guest: Annotated[
        str, typer.Option("--into-guest", metavar="VM", help="DEST is a path in this running VM (one file).")
    ] = "",
    libvirt: Annotated[
        str | None, typer.Option("--connect", envvar="LIBVIRT_DEFAULT_URI", help="libvirt's URI, for --into-guest.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare what is there, byte by byte; write anew what differs, and compare."),
    ] = False,
    privileged: Annotated[
        bool,
        typer.Option(
            "--privileged",
            help="Keep set-user-id bits, device nodes, sockets and attributes that give rights: the guest's word.",
        ),
    ] = False,
    no_owners: Annotated[
        bool, typer.Option("--no-owners", help="Let everything belong to us, without access lists.")
    ] = False,
    key_file: KeyFile = None,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Copy files and trees out of a snapshot, with owners, modes, times, attributes and holes.

    DEST is the file or directory itself, whether it is there already or not: a directory's content goes into it. DEST/
    is a directory to put what is named into, under its own name; it is made if need be. With several places DEST is
    DEST/ in any case.

    What was interrupted goes on where it was when the same command is given again. A file that is there already with
    the size and time that it had in the snapshot is taken to be the same; --verify reads it.
    """
    *sources, destination = places
    if not sources or not destination:
        raise Refusal("name what to restore, and then where to: SNAPSHOT:VOLUME/PARTITION/PATH DEST", USAGE)
    pairs = [split(source) for source in sources]
    if len({snapshot_id for snapshot_id, _ in pairs}) > 1:
        raise Refusal("all places must be of one snapshot", USAGE)
    paths = [path for _, path in pairs]
    with session.gateway() as gateway, OpenSnapshot(gateway, pairs[0][0], passphrase(key_file)) as opened:
        try:
            found = [_Found(*opened.find(path), _origin(opened, path)) for path in paths]
        except OSError as error:
            raise refusal(error) from None
        if into_guest:
            _into_guest(found, paths[0], into_guest, libvirt, destination, privileged=privileged)
            return
        wishes = Wishes(privileged, owners=not no_owners and os.geteuid() == 0, verify=verify)
        outcome = _to_host(found, destination, wishes)
    _report(outcome)


@dataclass(frozen=True)
class _Found:
    """A place in a snapshot."""

    tree: FileTree
    entry: Entry
    path: bytes
    origin: bytes

    @property
    def name(self) -> bytes:
        """Its own name; a whole tree's is its partition's."""
        return self.path.rsplit(b"/", 1)[-1] or self.tree.tree.name.encode()


def _origin(opened: OpenSnapshot, path: str) -> bytes:
    """Return what tells a place's tree from all others, also from a later one whose snapshot has the same id."""
    number, rest = opened.disk_of(path)
    volume = opened.group.members[number].volume
    when = opened.group.create_time.ToNanoseconds()
    words = (opened.group.id, str(when), volume.pool, volume.volume, rest.partition("/")[0])
    return "\0".join(words).encode()


def _to_host(found: list[_Found], destination: str, wishes: Wishes) -> Outcome:
    path = Path(destination)
    inside = len(found) > 1 or destination.endswith("/") or path.name in ("", "..") or destination.endswith("/.")
    names = [one.name for one in found] if inside else [os.fsencode(path.name)]
    if len(set(names)) < len(names):
        raise Refusal("two of the places have the same name; restore them to places of their own", USAGE)
    directory = path if inside else path.parent
    try:
        if inside:
            directory.mkdir(parents=True, exist_ok=True)
        size = sum(total(one.tree, one.entry) for one in found)
        with tables.progress() as bar:
            task = bar.add_task("restoring", total=size)
            with Restore(directory, wishes, lambda count: bar.advance(task, count)) as work:
                for one, name in zip(found, names, strict=True):
                    try:
                        work.copy(one.tree, one.origin, one.entry, name)
                    except OSError as error:
                        if len(found) == 1 or error.errno in NO_ROOM:
                            raise
                        work.outcome.problems.append(_said(error))
                return work.outcome
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise refusal(error) from None
        hint = f"; {destination}/ would put it in there" if error.errno == errno.EISDIR and not inside else ""
        raise Refusal(_said(error) + hint, REFUSED) from None


def _said(error: OSError) -> str:
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror or str(error)


def _into_guest(
    found: list[_Found], path: str, vm: str, uri: str | None, destination: str, *, privileged: bool
) -> None:
    if len(found) != 1:
        raise Refusal("--into-guest takes one file", USAGE)
    if not destination.startswith("/") or destination.endswith("/"):
        raise Refusal(f"{destination!r}: name the file's whole path in the guest", USAGE)
    tree, entry = found[0].tree, found[0].entry
    if not stat.S_ISREG(entry.mode):
        raise Refusal(f"{path} is not a file", REFUSED)
    mode = stat.S_IMODE(entry.mode)
    left_out = Counter[str]()
    if mode & (stat.S_ISUID | stat.S_ISGID) and not privileged:
        mode &= ~(stat.S_ISUID | stat.S_ISGID)
        left_out["set_id_bits"] += 1
    with tables.progress() as bar:
        task = bar.add_task("restoring", total=entry.size_bytes)
        try:
            put(
                vm,
                uri,
                destination,
                content(tree, entry),
                (entry.uid, entry.gid),
                mode,
                lambda count: bar.advance(task, count),
            )
        except GuestRefused as error:
            raise Refusal(str(error), NOT_FOUND if isinstance(error, NoSuchVm) else FAILED) from None
        except OSError as error:
            raise refusal(error) from None
    if session.json:
        told = {"vm": vm, "path": destination, "bytes": entry.size_bytes}
        print_json(told | {"left_out": {name: left_out[name] for name in _LEFT_OUT}})
    else:
        print(f"{destination} in {vm}: {entry.size_bytes} bytes")
        _print_left_out(left_out)


def _report(outcome: Outcome) -> None:
    if session.json:
        print_json(
            {
                "files": outcome.files,
                "bytes": outcome.bytes,
                "unchanged": outcome.unchanged,
                "repaired": outcome.repaired,
                "left_out": {name: outcome.left_out[name] for name in _LEFT_OUT},
                "problems": outcome.problems,
            }
        )
    else:
        kept = f", {outcome.unchanged} were there already" if outcome.unchanged else ""
        repaired = f", {outcome.repaired} of them because they differed" if outcome.repaired else ""
        print(f"{outcome.files} files restored{repaired}, {tables.size(outcome.bytes)}{kept}")
        _print_left_out(outcome.left_out)
        for problem in outcome.problems:
            print(f"  {printable(problem)}", file=sys.stderr)
    if outcome.problems:
        raise typer.Exit(FAILED)


def _print_left_out(left_out: Counter[str]) -> None:
    said = [f"{left_out[name]} {what}" for name, what in _LEFT_OUT.items() if left_out[name]]
    if said:
        print(f"left out: {', '.join(said)}")
