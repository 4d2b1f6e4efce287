"""Copying files and trees out of a snapshot: with owners, modes, times, attributes, hard links and holes.

A file appears under its name when it is whole and on disk: it is written beside it as .NAME.frostgate-partial, which
a repeat goes on with. A file that is there already with the size and time of the snapshot's is not read again, so that
a restore can be repeated until it is done. Nothing that the guest chose leads out of the destination: directories are
opened one by one without following links. Set-user-id bits and device nodes are left out unless asked for.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from clients.files.snapshot import FileTree, walk
from clients.files.wire import Entry

_READ_BYTES = 1024 * 1024
_HOLE_BYTES = 4096
_SYNC_BYTES = 64 * 1024 * 1024
_FOREIGN = (b"system.", b"trusted.", b"security.")


@dataclass
class Outcome:
    """What a restore did. `problems` are what was left out, in words."""

    files: int = 0
    bytes: int = 0
    unchanged: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wishes:
    """What to keep. `privileged` keeps set-user-id bits, device nodes and attributes of the system's name spaces."""

    privileged: bool = False
    owners: bool = True
    verify: bool = False


class Restore:
    """One restore of some places of a tree into a directory. Repeatable after whatever ended it."""

    def __init__(self, tree: FileTree, wishes: Wishes, advance: Callable[[int], None]) -> None:
        """Take what to keep, and whom to tell of bytes done."""
        self._tree = tree
        self._wishes = wishes
        self._advance = advance
        self._linked: dict[int, Path] = {}
        self.outcome = Outcome()

    def copy(self, entry: Entry, target: Path, name: bytes) -> None:
        """Copy an entry, with all below it, to target/name. Raises OSError when the destination does not let us."""
        with _directory(target) as parent:
            self._one(entry, parent, target, name)
            if not stat.S_ISDIR(entry.mode):
                return
        base = target / os.fsdecode(name)
        directories = [(base, entry)]
        for path, found in walk(self._tree, entry, b""):
            shown = os.fsdecode(path)
            if found is None:
                self.outcome.problems.append(f"{shown}: damaged in the snapshot")
                continue
            where = base / os.fsdecode(path)
            with _directory(base, path.rsplit(b"/", 1)[0] if b"/" in path else b"") as parent:
                self._one(found, parent, where.parent, path.rsplit(b"/", 1)[-1])
            if stat.S_ISDIR(found.mode):
                directories.append((where, found))
        # last of all, and the deepest first: writing into a directory changes its time
        for where, found in reversed(directories):
            with _directory(where) as descriptor:
                self._attributes(found, descriptor, str(where))
                os.fsync(descriptor)

    def _one(self, entry: Entry, parent: int, directory: Path, name: bytes) -> None:
        kind = stat.S_IFMT(entry.mode)
        where = directory / os.fsdecode(name)
        try:
            if kind == stat.S_IFREG:
                self._file(entry, parent, where, name)
            elif kind == stat.S_IFDIR:
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=parent)
                os.close(os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent))
            elif kind == stat.S_IFLNK:
                self._link(entry, parent, name)
            elif kind == stat.S_IFIFO or self._wishes.privileged:
                with suppress(FileExistsError):
                    os.mknod(name, kind | 0o600, os.makedev(*entry.device), dir_fd=parent)
                self._times_and_owner(entry, parent, name)
            else:
                self.outcome.problems.append(f"{where}: a device node or socket, left out")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            self.outcome.problems.append(f"{where}: {error.strerror or error}")

    def _file(self, entry: Entry, parent: int, where: Path, name: bytes) -> None:
        first = self._linked.get(entry.id)
        if first is not None:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent)
            os.link(first, name, dst_dir_fd=parent, follow_symlinks=False)
            return
        if entry.links > 1:
            self._linked[entry.id] = where
        if self._is_there(entry, parent, name):
            self._keep(entry, parent, name)
            self.outcome.unchanged += 1
            self._advance(entry.size_bytes)
        else:
            self._content(entry, parent, name)
            self.outcome.files += 1
            self.outcome.bytes += entry.size_bytes
        if self._wishes.verify:
            self._compare(entry, parent, name)

    def _is_there(self, entry: Entry, parent: int, name: bytes) -> bool:
        try:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == (entry.size_bytes, entry.mtime_ns)

    def _keep(self, entry: Entry, parent: int, name: bytes) -> None:
        """Dress a file that is there already: an earlier restore may have been told to keep less."""
        if self._wishes.owners or self._wishes.privileged:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=parent)
            try:
                self._attributes(entry, file, os.fsdecode(name))
            finally:
                os.close(file)

    def _content(self, entry: Entry, parent: int, name: bytes) -> None:
        partial = b"." + name[:200] + b".frostgate-partial"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(partial, flags, 0o600, dir_fd=parent)
        try:
            # what lies before the last whole stretch was synced before the file grew beyond it
            position = os.fstat(file).st_size // _SYNC_BYTES * _SYNC_BYTES
            position = max(0, min(position - _SYNC_BYTES, entry.size_bytes))
            os.ftruncate(file, position)
            self._advance(position)
            unsynced = 0
            while position < entry.size_bytes:
                part = self._tree.parser.read(self._tree.number, entry.id, position, _READ_BYTES)
                if not part:
                    raise OSError(errno.EIO, f"the snapshot has only {position} of its {entry.size_bytes} bytes")
                _write_sparse(file, position, part)
                position += len(part)
                unsynced += len(part)
                if unsynced >= _SYNC_BYTES:
                    os.ftruncate(file, position)
                    os.fsync(file)
                    unsynced = 0
                self._advance(len(part))
            os.ftruncate(file, entry.size_bytes)
            self._attributes(entry, file, os.fsdecode(name))
            os.fsync(file)
        finally:
            os.close(file)
        os.rename(partial, name, src_dir_fd=parent, dst_dir_fd=parent)

    def _link(self, entry: Entry, parent: int, name: bytes) -> None:
        target = self._tree.parser.link(self._tree.number, entry.id)
        with suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(name, dir_fd=parent)
        os.symlink(target, name, dir_fd=parent)
        self._times_and_owner(entry, parent, name)

    def _times_and_owner(self, entry: Entry, parent: int, name: bytes) -> None:
        if self._wishes.owners:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISLNK(entry.mode):
            os.chmod(name, stat.S_IMODE(entry.mode), dir_fd=parent)
        os.utime(name, ns=(entry.atime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _attributes(self, entry: Entry, descriptor: int, shown: str) -> None:
        try:
            attributes = self._tree.parser.xattrs(self._tree.number, entry.id)
        except OSError as error:
            self.outcome.problems.append(f"{shown}: its extended attributes cannot be read ({error.strerror})")
            attributes = {}
        for name, value in attributes.items():
            if name.startswith(_FOREIGN) and not self._wishes.privileged:
                continue
            if value is None:
                self.outcome.problems.append(f"{shown}: attribute {os.fsdecode(name)}: its value cannot be read")
                continue
            try:
                os.setxattr(descriptor, name, value)
            except OSError as error:
                self.outcome.problems.append(f"{shown}: attribute {os.fsdecode(name)}: {error.strerror}")
        if self._wishes.owners:
            os.fchown(descriptor, entry.uid, entry.gid)
        mode = stat.S_IMODE(entry.mode)
        os.fchmod(descriptor, mode if self._wishes.privileged else mode & ~(stat.S_ISUID | stat.S_ISGID))
        os.utime(descriptor, ns=(entry.atime_ns, entry.mtime_ns))

    def _compare(self, entry: Entry, parent: int, name: bytes) -> None:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from what we wrote
            position = 0
            while position < entry.size_bytes:
                part = self._tree.parser.read(self._tree.number, entry.id, position, _READ_BYTES)
                if not part or os.pread(file, len(part), position) != part:
                    raise OSError(errno.EIO, f"differs from the snapshot near byte {position}")
                position += len(part)
            if os.fstat(file).st_size != entry.size_bytes:
                raise OSError(errno.EIO, "has another size than in the snapshot")
        finally:
            os.close(file)


def total(tree: FileTree, entry: Entry) -> int:
    """Return the bytes that a restore of an entry reads, hard links once. Raises OSError."""
    if not stat.S_ISDIR(entry.mode):
        return entry.size_bytes if stat.S_ISREG(entry.mode) else 0
    sizes = {found.id: found.size_bytes for _, found in walk(tree, entry, b"") if found and stat.S_ISREG(found.mode)}
    return sum(sizes.values())


@contextmanager
def _directory(base: Path, inner: bytes = b"") -> Iterator[int]:
    """Open a directory below one of ours, following no link on the way from it. Raises OSError."""
    descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in filter(None, inner.split(b"/")):
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def _write_sparse(file: int, offset: int, content: bytes) -> None:
    """Write what is not zeros, in runs of blocks; the rest stays a hole."""
    zeros = bytes(_HOLE_BYTES)
    begin = None
    for at in range(0, len(content), _HOLE_BYTES):
        block = content[at : at + _HOLE_BYTES]
        empty = block == zeros[: len(block)]
        if empty and begin is not None:
            _write(file, offset + begin, content[begin:at])
            begin = None
        elif not empty and begin is None:
            begin = at
    if begin is not None:
        _write(file, offset + begin, content[begin:])


def _write(file: int, offset: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
