"""The members of one snapshot, opened: their blocks and their file systems, by the names that users type.

A path within a snapshot is VOLUME/PARTITION/PATH. The volume is named as `frostgate snapshot show` names it, or
POOL/VOLUME; "whole" is the partition of a disk without partitions, VG-LV that of a logical volume.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Self

import grpc
import structlog

from clients.blocks import Blocks, open_blocks
from clients.files.parser import Parser
from clients.files.wire import Entry, Tree
from clients.gateway import Gateway, GatewayError
from clients.page_cache import PageCache
from frostgate.v1 import group_snapshot_pb2 as pb

READABLE = (pb.GROUP_SNAPSHOT_STATE_READY, pb.GROUP_SNAPSHOT_STATE_REVERTING)

_SCANNED_AT_ONCE = 4
_log = structlog.get_logger()


@dataclass(frozen=True)
class FileTree:
    """One file system of a snapshot, in the parser that reads it; `serial` is no other tree's in this process."""

    parser: Parser
    number: int
    tree: Tree
    note: str
    serial: int = field(default_factory=count().__next__)


class NoSuchPlace(OSError):
    """A snapshot has nothing of that path."""


class OpenSnapshot:
    """A READY snapshot; use it in a `with` block.

    Each disk's file systems are read by a parser of their own, so that a hostile disk harms none but itself;
    disks that share an LVM volume group share a parser.
    """

    def __init__(
        self, gateway: Gateway, snapshot_id: str, passphrase: str | None = None, cache: PageCache | None = None
    ) -> None:
        """Look the snapshot up; it has a cache of its own if none is given.

        Raises GatewayError, also STATE_INVALID when it is not READY.
        """
        self.group = gateway.get(snapshot_id)
        check_readable(self.group)
        cache = cache or PageCache()
        self.names = member_names(self.group)
        self.disks = [open_blocks(gateway, self.group, member, cache) for member in self.group.members]
        self._passphrase = passphrase
        self._parsers: list[Parser] = []
        self._trees: list[list[FileTree]] | None = None
        self._looking = threading.Lock()

    def trees(self) -> list[list[FileTree]]:
        """Return the file systems of every disk, in the members' order. Looked for once. Thread-safe."""
        with self._looking:
            if self._trees is None:
                self._trees = self._scan()
            return self._trees

    def _scan(self) -> list[list[FileTree]]:
        """Return what is on the disks. A parser that dies of a disk leaves the others readable."""
        with ThreadPoolExecutor(_SCANNED_AT_ONCE) as pool:
            by_disk = list(pool.map(lambda disk: self._of([disk]), self.disks))
        incomplete = [number for number, found in enumerate(by_disk) if any(one.tree.kind == "lvm" for one in found)]
        if len(incomplete) > 1:
            for one in self._of([self.disks[number] for number in incomplete]):
                tree = one.tree
                if tree.kind == "lvm" or len(tree.disks) < 2:
                    continue
                for disk_number in tree.disks:
                    mine = by_disk[incomplete[disk_number]]
                    mine[:] = [*(other for other in mine if other.tree.kind != "lvm"), one]
        return by_disk

    def _of(self, disks: list[Blocks]) -> list[FileTree]:
        parser = Parser(disks, self._passphrase)
        self._parsers.append(parser)
        try:
            layout = parser.layout()
        except OSError as error:
            why = f"Not shown: the parser died of this disk ({error.strerror}).\n"
            layout = [Tree((0,), "whole", "unknown", why_not=why)]
        return [FileTree(parser, number, tree, self._note(tree)) for number, tree in enumerate(layout)]

    def _note(self, tree: Tree) -> str:
        """Leave out what a verified freeze makes untrue."""
        quiet = self.group.consistency in (pb.CONSISTENCY_FILESYSTEM, pb.CONSISTENCY_APPLICATION)
        return "" if tree.kind == "xfs" and quiet else tree.note

    def find(self, path: str) -> tuple[FileTree, Entry, bytes]:
        """Return the entry of VOLUME/PARTITION[/PATH] and its path in the tree. Raises OSError, NoSuchPlace of it."""
        disk, rest = self.disk_of(path)
        name, _, inner = rest.partition("/")
        for one in self.trees()[disk]:
            if one.tree.name == name:
                if one.tree.why_not:
                    raise OSError(errno.ENOTSUP, one.tree.why_not.strip(), path)
                return one, *_walk(one, inner, path)
        known = ", ".join(one.tree.name for one in self.trees()[disk])
        raise NoSuchPlace(errno.ENOENT, f"no partition {name!r}; there are: {known or 'none'}", path)

    def disk_of(self, path: str) -> tuple[int, str]:
        """Split a path into the number of its disk and what follows. Raises NoSuchPlace."""
        for number, member in enumerate(self.group.members):
            for name in (self.names[number], member.volume.volume, f"{member.volume.pool}/{member.volume.volume}"):
                if path == name or path.startswith(f"{name}/"):
                    return number, path[len(name) :].strip("/")
        raise NoSuchPlace(errno.ENOENT, f"no such volume; there are: {', '.join(self.names)}", path)

    def close(self) -> None:
        """End the parsers and close the disks."""
        for parser in self._parsers:
            parser.close()
        for disk in self.disks:
            disk.close()

    def __enter__(self) -> Self:
        """Enter: the snapshot itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Exit: close()."""
        self.close()


def check_readable(group: pb.GroupSnapshot) -> None:
    """Raise GatewayError STATE_INVALID unless a snapshot's members can be read."""
    if group.state not in READABLE:
        state = pb.GroupSnapshotState.Name(group.state).removeprefix("GROUP_SNAPSHOT_STATE_")
        raise GatewayError(
            grpc.StatusCode.FAILED_PRECONDITION,
            "STATE_INVALID",
            f"group snapshot {group.id} is {state}; only a READY one can be read",
        )


def member_names(group: pb.GroupSnapshot) -> list[str]:
    """Return a file name for each member: the volume's, with its pool where two pools have one of the same name."""
    volumes = [member.volume.volume for member in group.members]
    return [
        (name if volumes.count(name) == 1 else f"{member.volume.pool}:{name}").replace("/", "%2F")
        for name, member in zip(volumes, group.members, strict=True)
    ]


def walk(tree: FileTree, entry: Entry, path: bytes) -> Iterator[tuple[bytes, Entry | None]]:
    """Yield everything below a directory, parents first, with paths. Raises OSError.

    What is damaged comes as None: an entry that cannot be read, a directory that was met before (a loop), and the
    path of a directory whose own entries cannot be read, which has come as itself before.
    """
    waiting = [(path, entry.id)]
    met = {entry.id}
    while waiting:
        directory, number = waiting.pop()
        try:
            entries = sorted(tree.parser.entries(tree.number, number), key=lambda one: one[0])
        except OSError as error:
            if directory == path:
                raise
            _log.warning("directory_damaged", path=os.fsdecode(directory), error=str(error))
            yield directory, None
            continue
        for name, found in entries:
            where = directory + b"/" + name if directory else name
            if found and stat.S_ISDIR(found.mode):
                if found.id in met:
                    yield where, None
                    continue
                met.add(found.id)
                waiting.append((where, found.id))
            yield where, found


def _walk(one: FileTree, inner: str, path: str) -> tuple[Entry, bytes]:
    entry = one.parser.root(one.number)
    parts = [part for part in inner.encode("utf-8", "surrogateescape").split(b"/") if part not in (b"", b".")]
    for part in parts:
        if not stat.S_ISDIR(entry.mode):
            raise NoSuchPlace(errno.ENOTDIR, "not a directory on the way", path)
        found = one.parser.find(one.number, entry.id, part)
        if found is None:
            raise NoSuchPlace(errno.ENOENT, f"no {part.decode(errors='replace')!r} there", path)
        entry = found
    return entry, b"/".join(parts)
