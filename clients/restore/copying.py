"""Copying files and trees out of a snapshot: with owners, modes, times, attributes, hard links and holes.

A file appears under its name when it is whole and on disk. A file that is there already with the size and time of the
snapshot's is not read again, unless it is to be verified, so that a restore can be repeated until it is done. Nothing
that the guest chose leads out of the destination: whatever is done is done below directories that were opened one by
one without following links. Set-user-id bits, device nodes and sockets are left out unless asked for.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from clients.files.snapshot import FileTree, walk
from clients.files.wire import Entry
from clients.restore.beneath import Beneath, Parts, handle, itself, status
from clients.restore.contents import Source, difference, forget_partials, partials, write
from clients.restore.dressing import Wishes, dress

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass
class Outcome:
    """What a restore did. `left_out` counts what it left out on purpose, `problems` says in words what failed."""

    files: int = 0
    bytes: int = 0
    unchanged: int = 0
    repaired: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Item:
    """An entry of a tree and where it goes."""

    tree: FileTree
    origin: bytes
    entry: Entry
    parts: Parts

    @property
    def name(self) -> bytes:
        return self.parts[-1]

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.entry.mode)


class Restore:
    """One restore of some places into a directory. Repeatable after whatever ended it. Use it in a `with` block."""

    def __init__(self, directory: Path, wishes: Wishes, advance: Callable[[int], None]) -> None:
        """Take where to, what to keep, and whom to tell of bytes done. Raises OSError: there is no such directory."""
        self._directory = directory
        self._beneath = Beneath(directory)
        self._wishes = wishes
        self._advance = advance
        self._partials: tuple[Parts, list[bytes]] | None = None
        self._linked: dict[tuple[int, int], tuple[Parts, os.stat_result]] = {}
        self.outcome = Outcome()

    def copy(self, tree: FileTree, origin: bytes, entry: Entry, name: bytes) -> None:
        """Copy an entry, with all below it, to a name in the directory.

        Args:  origin  tells the tree from all others there ever were (contents.Source)
        Raises OSError with the path: the entry itself cannot be made, or there is no room. What is below it and cannot
        be made is a problem of the outcome.
        """
        top = _Item(tree, origin, entry, (name,))
        self._one(top)
        if top.kind == stat.S_IFDIR:
            self._dress_directories([top, *self._fill(top)])

    def _fill(self, top: _Item) -> list[_Item]:
        """Make all below a directory; return the directories, a parent before what is in it."""
        made, refused = [], set[Parts]()
        for path, found in self._below(top):
            parts = (*top.parts, *path.split(b"/"))
            if parts[:-1] in refused:
                refused.add(parts)
                continue
            if found is None:
                self._problem(parts, "damaged in the snapshot")
                continue
            item = _Item(top.tree, top.origin, found, parts)
            try:
                self._one(item)
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise
                self._problem(parts, error.strerror or str(error))
                if item.kind == stat.S_IFDIR:
                    refused.add(parts)
            else:
                if item.kind == stat.S_IFDIR:
                    made.append(item)
        return made

    def _dress_directories(self, made: list[_Item]) -> None:
        """Dress directories, last of all and the deepest first: writing into a directory changes its time."""
        for item in reversed(made):
            try:
                with self._beneath.opened(item.parts) as descriptor:
                    self._dress(item, descriptor)
                    os.fsync(descriptor)
            except OSError as error:
                self._problem(item.parts, error.strerror or str(error))

    def close(self) -> None:
        """Close what is open."""
        self._beneath.close()

    def _below(self, top: _Item) -> Iterator[tuple[bytes, Entry | None]]:
        try:
            yield from walk(top.tree, top.entry, b"")
        except OSError as error:
            self._problem(top.parts, error.strerror or str(error))

    def _shown(self, parts: Parts) -> str:
        return str(self._directory.joinpath(*map(os.fsdecode, parts)))

    def _problem(self, parts: Parts, what: str) -> None:
        self.outcome.problems.append(f"{self._shown(parts)}: {what}")

    def _one(self, item: _Item) -> None:
        """Make one entry, a directory without what is in it. Raises OSError with its path."""
        try:
            parent = self._beneath.directory(item.parts[:-1])
            if item.kind == stat.S_IFREG:
                self._file(item, parent)
            elif item.kind == stat.S_IFDIR:
                self._make_directory(item, parent)
            elif item.kind == stat.S_IFLNK:
                self._link(item, parent)
            elif item.kind == stat.S_IFIFO or self._wishes.privileged:
                self._node(item, parent)
            else:
                self.outcome.left_out["sockets" if item.kind == stat.S_IFSOCK else "devices"] += 1
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), self._shown(item.parts)) from error

    def _make_directory(self, item: _Item, parent: int) -> None:
        with suppress(FileExistsError):
            os.mkdir(item.name, 0o700, dir_fd=parent)
        found = status(parent, item.name)
        if found is None or not stat.S_ISDIR(found.st_mode):
            raise OSError(errno.ENOTDIR, "what is there is no directory; nothing is restored below it")

    def _link(self, item: _Item, parent: int) -> None:
        target = item.tree.parser.link(item.tree.number, item.entry.id)
        with suppress(FileNotFoundError):
            os.unlink(item.name, dir_fd=parent)
        os.symlink(target, item.name, dir_fd=parent)
        if self._wishes.owners:
            os.chown(item.name, item.entry.uid, item.entry.gid, dir_fd=parent, follow_symlinks=False)
        times = (item.entry.atime_ns, item.entry.mtime_ns)
        os.utime(item.name, ns=times, dir_fd=parent, follow_symlinks=False)

    def _node(self, item: _Item, parent: int) -> None:
        device = os.makedev(*item.entry.device)
        found = status(parent, item.name)
        if found is None or (stat.S_IFMT(found.st_mode), found.st_rdev) != (item.kind, device):
            if found is not None:
                os.unlink(item.name, dir_fd=parent)
            os.mknod(item.name, item.kind | 0o600, device, dir_fd=parent)
        self._dress_again(item, parent)

    def _file(self, item: _Item, parent: int) -> None:
        key = (item.tree.serial, item.entry.id)
        if key in self._linked and self._hard_link(item, parent, *self._linked[key]):
            return
        source = Source(item.tree, item.entry, item.origin)
        forget_partials(parent, self._left_in(item.parts[:-1], parent), item.name, source)
        if not self._is_there(item, parent, source):
            self._write(item, parent, source)
        found = status(parent, item.name)
        if item.entry.links > 1 and found is not None:
            self._linked[key] = item.parts, found

    def _is_there(self, item: _Item, parent: int, source: Source) -> bool:
        """Tell whether a file is there already, as it should be; it is dressed then."""
        entry, found = item.entry, status(parent, item.name)
        if found is None:
            return False
        if stat.S_ISDIR(found.st_mode):
            raise OSError(errno.EISDIR, "what is there is a directory")
        if not stat.S_ISREG(found.st_mode) or (found.st_size, found.st_mtime_ns) != (entry.size_bytes, entry.mtime_ns):
            return False
        if self._wishes.verify and difference(source, parent, item.name):
            self.outcome.repaired += 1
            return False
        # an earlier restore may have been told to keep less, or more
        self._dress_again(item, parent)
        self.outcome.unchanged += 1
        self._advance(entry.size_bytes)
        return True

    def _write(self, item: _Item, parent: int, source: Source) -> None:
        def finish(file: int) -> None:
            self._dress(item, file)

        write(source, parent, item.name, finish, self._advance)
        self.outcome.files += 1
        self.outcome.bytes += item.entry.size_bytes
        if self._wishes.verify and difference(source, parent, item.name):
            # what was there of an interrupted restore was not what had been written, or the disk lost it
            write(source, parent, item.name, lambda file: self._dress(item, file, silent=True), lambda _: None)
            self.outcome.repaired += 1
            if what := difference(source, parent, item.name):
                raise OSError(errno.EIO, what)

    def _hard_link(self, item: _Item, parent: int, parts: Parts, first: os.stat_result) -> bool:
        """Make a file another name of one that was restored; False if that one is not there any more."""
        with self._beneath.opened(parts[:-1]) as directory:
            there = status(directory, parts[-1])
            if there is None or not os.path.samestat(there, first):
                return False
            found = status(parent, item.name)
            if found is None or not os.path.samestat(found, first):
                if found is not None:
                    os.unlink(item.name, dir_fd=parent)
                os.link(parts[-1], item.name, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False)
        return True

    def _left_in(self, parts: Parts, parent: int) -> list[bytes]:
        """Return the partial files in a directory, as it was first looked at."""
        if self._partials is None or self._partials[0] != parts:
            self._partials = parts, partials(parent)
        return self._partials[1]

    def _dress_again(self, item: _Item, parent: int) -> None:
        with itself(parent, item.name) as descriptor:
            if stat.S_IFMT(os.fstat(descriptor).st_mode) != item.kind:
                raise OSError(errno.EBUSY, "somebody else puts other things in its place")
            self._dress(item, handle(descriptor))

    def _dress(self, item: _Item, file: int | str, *, silent: bool = False) -> None:
        attributes: dict[bytes, bytes | None] | None = {}
        problems = []
        if item.entry.attributed:
            try:
                attributes = item.tree.parser.xattrs(item.tree.number, item.entry.id)
            except OSError as error:
                attributes = None
                problems.append(f"its extended attributes cannot be read ({error.strerror})")
        left_out = Counter[str]()
        problems += dress(file, item.entry, attributes, self._wishes, left_out)
        if not silent:
            self.outcome.left_out += left_out
            for problem in problems:
                self._problem(item.parts, problem)

    def __enter__(self) -> Self:
        """Enter: the restore itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Exit: close()."""
        self.close()


def total(tree: FileTree, entry: Entry) -> int:
    """Return the bytes that a restore of an entry reads, hard links once. Raises OSError."""
    if not stat.S_ISDIR(entry.mode):
        return entry.size_bytes if stat.S_ISREG(entry.mode) else 0
    sizes = {found.id: found.size_bytes for _, found in walk(tree, entry, b"") if found and stat.S_ISREG(found.mode)}
    return sum(sizes.values())
