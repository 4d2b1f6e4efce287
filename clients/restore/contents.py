"""The content of one file, out of a snapshot and onto this host's disk.

It is written beside its place, under a name that says of what it is: an interrupted restore of that very file goes on
with it, and any other begins anew. Holes are neither read nor written.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from clients.files.snapshot import FileTree
from clients.files.wire import Entry
from clients.restore.beneath import status

_READ_BYTES = 1024 * 1024
_BLOCK_BYTES = 4096
_SYNC_BYTES = 64 * 1024 * 1024
_NAME_BYTES = 200
_SUFFIX = b".frostgate-partial"
_DIGEST = re.compile(rb"[0-9a-f]{16}")
_ZEROS = bytes(_READ_BYTES)


@dataclass(frozen=True)
class Source:
    """A file in a snapshot. `origin` tells the snapshot, volume and tree from all others there ever were."""

    tree: FileTree
    entry: Entry
    origin: bytes

    def partial(self, name: bytes) -> bytes:
        """Return the name under which this file is written that will have a name."""
        entry = self.entry
        what = b"%s\0%d\0%d\0%d" % (self.origin, entry.id, entry.size_bytes, entry.mtime_ns)
        return _beginning(name) + hashlib.sha256(what).hexdigest()[:16].encode() + _SUFFIX

    def data(self) -> list[tuple[int, int]]:
        """Return what is not known to be a hole as (begin, end), in order and apart."""
        size = self.entry.size_bytes
        found = [(0, size)]
        if self.entry.sparse:
            with suppress(OSError):  # too many to tell, or damaged: what is read tells
                found = [(at, at + length) for at, length in self.tree.parser.data(self.tree.number, self.entry.id)]
        apart: list[tuple[int, int]] = []
        done = 0
        for begin, end in sorted(found):
            if max(done, begin) < min(end, size):
                apart.append((max(done, begin), min(end, size)))
                done = apart[-1][1]
        return apart

    def read(self, position: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of what is not a hole from a position on. Raises OSError."""
        for begin, end in self.data():
            at = max(begin, position)
            while at < end:
                part = self.tree.parser.read(self.tree.number, self.entry.id, at, min(_READ_BYTES, end - at))
                if not part:
                    raise OSError(errno.EIO, f"the snapshot has only {at} of its {self.entry.size_bytes} bytes")
                yield at, part
                at += len(part)


def write(
    source: Source, parent: int, name: bytes, dress: Callable[[int], None], advance: Callable[[int], None]
) -> None:
    """Write a file into a directory. It has its name when it is whole, dressed and on the disk.

    Args:  dress    gives the open file what it has beside its content
           advance  is told of bytes done
    Raises OSError; what was written stays beside the place then.
    """
    partial, size = source.partial(name), source.entry.size_bytes
    with _partial(parent, partial) as file:
        # what lies before the last whole stretch was synced before the file grew beyond it
        synced = os.fstat(file).st_size // _SYNC_BYTES * _SYNC_BYTES
        synced = max(0, min(synced - _SYNC_BYTES, size))
        os.ftruncate(file, synced)
        advance(synced)
        done = synced
        for offset, part in source.read(synced):
            end = offset + len(part)
            if end - synced > _SYNC_BYTES:
                os.fsync(file)
                os.ftruncate(file, offset)
                synced = offset
            _write_sparse(file, offset, part)
            advance(end - done)
            done = end
        os.ftruncate(file, size)
        advance(size - done)
        dress(file)
        os.fsync(file)
        os.rename(partial, name, src_dir_fd=parent, dst_dir_fd=parent)


def difference(source: Source, parent: int, name: bytes) -> str:
    """Return in words where a file on the disk differs from a snapshot's; "" if it does not. Raises OSError."""
    size = source.entry.size_bytes
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    try:
        if os.fstat(file).st_size != size:
            return "has another size than in the snapshot"
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from what we wrote
        done = 0
        for offset, part in source.read():
            if not _is_hole(file, done, offset) or os.pread(file, len(part), offset) != part:
                return f"differs from the snapshot near byte {offset}"
            done = offset + len(part)
        return "" if _is_hole(file, done, size) else f"differs from the snapshot after byte {done}"
    finally:
        os.close(file)


def forget_partials(parent: int, names: list[bytes], name: bytes, source: Source) -> None:
    """Remove what interrupted restores of other files left that were to have a name. Raises OSError.

    Args:  names  the directory's, as it was opened
    """
    beginning, mine = _beginning(name), source.partial(name)
    for other in names:
        digest = other[len(beginning) : -len(_SUFFIX)]
        if other.startswith(beginning) and _DIGEST.fullmatch(digest) and other != mine:
            with suppress(FileNotFoundError):
                os.unlink(other, dir_fd=parent)


def partials(parent: int) -> list[bytes]:
    """Return the names in a directory that interrupted restores left. Raises OSError."""
    return [name for name in map(os.fsencode, os.listdir(parent)) if name.endswith(_SUFFIX)]


def _beginning(name: bytes) -> bytes:
    return b"." + name[:_NAME_BYTES] + b"."


@contextmanager
def _partial(parent: int, partial: bytes) -> Iterator[int]:
    """Open what an earlier restore left, or a new file. Raises OSError, EBUSY while another restore writes it."""
    found = status(parent, partial)
    if found is not None and not _ours(found):
        # whoever made it, it was not we; or it is dressed, and only its name was wanting
        os.unlink(partial, dir_fd=parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(partial, flags, 0o600, dir_fd=parent)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another restore writes it now") from None
        opened, found = os.fstat(file), status(parent, partial)
        if found is None or not os.path.samestat(found, opened) or not _ours(opened):
            raise OSError(errno.EBUSY, "another restore wrote it just now")
        yield file
    finally:
        os.close(file)


def _ours(found: os.stat_result) -> bool:
    """Tell whether nobody but us can have written a file."""
    private = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and private


def _write_sparse(file: int, offset: int, content: bytes) -> None:
    """Write what is not zeros, in runs of blocks; the rest stays a hole."""
    begin = None
    for at in range(0, len(content), _BLOCK_BYTES):
        block = content[at : at + _BLOCK_BYTES]
        empty = block == _ZEROS[: len(block)]
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


def _is_hole(file: int, begin: int, end: int) -> bool:
    """Tell whether a range of a file is all zeros, of which its holes need no reading."""
    while begin < end:
        try:
            begin = os.lseek(file, begin, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end of the file
                return True
            raise
        part = os.pread(file, max(0, min(_READ_BYTES, end - begin)), begin)
        if part != _ZEROS[: len(part)]:
            return False
        begin += len(part) or end
    return True
