"""`frostgate restore`: files and trees out of a snapshot, to this host or into a running guest."""

from __future__ import annotations

import os
import stat
import sys
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
from clients.files.snapshot import OpenSnapshot
from clients.restore.copying import Outcome, Restore, Wishes, total
from clients.restore.guest import GuestRefused, NoSuchVm, put


@command
def restore(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="SNAPSHOT:VOLUME/PARTITION/PATH... DEST", help="What, all of one snapshot, and whereto."
        ),
    ],
    into_guest: Annotated[
        str, typer.Option("--into-guest", metavar="VM", help="DEST is a path in this running VM (one file).")
    ] = "",
    libvirt: Annotated[
        str | None, typer.Option("--connect", envvar="LIBVIRT_DEFAULT_URI", help="libvirt's URI, for --into-guest.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read again what was written, and compare.")] = False,
    privileged: Annotated[
        bool,
        typer.Option(
            "--privileged",
            help="Keep set-user-id bits, device nodes and attributes that give rights: the guest's word.",
        ),
    ] = False,
    no_owners: Annotated[bool, typer.Option("--no-owners", help="Let everything belong to us.")] = False,
    key_file: KeyFile = None,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Copy files and trees out of a snapshot, with owners, modes, times, attributes and holes.

    What was interrupted goes on where it was when the same command is given again.
    """
    *sources, destination = places
    if not sources:
        raise Refusal("name what to restore, and then where to: SNAPSHOT:VOLUME/PARTITION/PATH DEST", USAGE)
    pairs = [split(source) for source in sources]
    if len({snapshot_id for snapshot_id, _ in pairs}) > 1:
        raise Refusal("all places must be of one snapshot", USAGE)
    paths = [path for _, path in pairs]
    with session.gateway() as gateway, OpenSnapshot(gateway, pairs[0][0], passphrase(key_file)) as opened:
        try:
            if into_guest:
                _into_guest(opened, paths, into_guest, libvirt, destination)
                return
            wishes = Wishes(privileged, owners=not no_owners and os.geteuid() == 0, verify=verify)
            outcomes = _to_host(opened, paths, Path(destination), wishes)
        except OSError as error:
            raise refusal(error) from None
    _report(outcomes)


def _to_host(opened: OpenSnapshot, paths: list[str], destination: Path, wishes: Wishes) -> list[Outcome]:
    found = [opened.find(path) for path in paths]
    into = destination.is_dir() or len(found) > 1 or not found[0][2]
    if into:
        destination.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with tables.progress() as bar:
        task = bar.add_task("restoring", total=sum(total(tree, entry) for tree, entry, _ in found))
        for tree, entry, path in found:
            name = path.rsplit(b"/", 1)[-1] or tree.tree.name.encode()
            target, name = (
                (destination, name) if into else (destination.absolute().parent, os.fsencode(destination.name))
            )
            work = Restore(tree, wishes, lambda count: bar.advance(task, count))
            work.copy(entry, target, name)
            outcomes.append(work.outcome)
    return outcomes


def _into_guest(opened: OpenSnapshot, paths: list[str], vm: str, uri: str | None, destination: str) -> None:
    if len(paths) != 1:
        raise Refusal("--into-guest takes one file", USAGE)
    if not destination.startswith("/") or destination.endswith("/"):
        raise Refusal(f"{destination!r}: name the file's whole path in the guest", USAGE)
    tree, entry, _ = opened.find(paths[0])
    if not stat.S_ISREG(entry.mode):
        raise Refusal(f"{paths[0]} is not a file", REFUSED)
    with tables.progress() as bar:
        task = bar.add_task("restoring", total=entry.size_bytes)
        try:
            put(
                vm,
                uri,
                destination,
                content(tree, entry),
                (entry.uid, entry.gid),
                stat.S_IMODE(entry.mode),
                lambda count: bar.advance(task, count),
            )
        except GuestRefused as error:
            raise Refusal(str(error), NOT_FOUND if isinstance(error, NoSuchVm) else FAILED) from None
    if session.json:
        print_json({"vm": vm, "path": destination, "bytes": entry.size_bytes})
    else:
        print(f"{destination} in {vm}: {entry.size_bytes} bytes")


def _report(outcomes: list[Outcome]) -> None:
    files, unchanged = sum(one.files for one in outcomes), sum(one.unchanged for one in outcomes)
    size = sum(one.bytes for one in outcomes)
    problems = [problem for one in outcomes for problem in one.problems]
    if session.json:
        print_json({"files": files, "bytes": size, "unchanged": unchanged, "problems": problems})
    else:
        kept = f", {unchanged} were there already" if unchanged else ""
        print(f"{files} files restored, {tables.size(size)}{kept}")
        for problem in problems:
            print(f"  {printable(problem)}", file=sys.stderr)
    if problems:
        raise typer.Exit(FAILED)
