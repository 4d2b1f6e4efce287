"""NTFS and FAT through libfsntfs and libfsfat. Runs in the confined process.

They have no owners and modes of ours: directories are 0755, files 0644, of root. FAT's local times are taken as UTC;
they are read here, as libfsfat (20260826) gives them a month late.
Source: Microsoft FAT specification, "Date and Time Formats".
"""

from __future__ import annotations

import errno
import stat
import struct
from collections import OrderedDict
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from clients.files.ranges import Bytes, FileObject
from clients.files.sleuthkit_names import SleuthkitNames
from clients.files.wire import Entry

_OPEN = 1024
_DIRECTORIES = 64
_EXTENTS_COUNTED = 256
_SPARSE = 1
_ATTRIBUTE_DIRECTORY = 0x10
_MFT_MASK = 0xFFFFFFFFFFFF
_FIRST_USER_FILE = 16
_FAT_ENTRY_BYTES = 32
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class DosTree:
    """One file system; ids are NTFS's file numbers or libfsfat's identifiers."""

    def __init__(self, library: Any, source: Bytes, names: SleuthkitNames | None = None) -> None:
        """Open it; `names`, which NTFS has, knows those of what the library refuses.

        Raises OSError when it is damaged.
        """
        self._source = source
        self._spare = names
        ntfs = names is not None
        self._volume = library.volume()
        self._volume.open_file_object(FileObject(source))
        self._ntfs = ntfs
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._names: OrderedDict[int, dict[bytes, int]] = OrderedDict()
        root = self._volume.get_root_directory()
        self.root_id = self._id(root)
        self.label = str((self._volume.get_name() if ntfs else self._volume.get_label()) or "")
        self._keep(self.root_id, root)

    def entry(self, number: int) -> Entry:
        """Return one file. Raises OSError."""
        found = self._entry(number)
        kind = self._kind(number, found)
        size = int(found.size) if kind == stat.S_IFREG else len(self.link(number)) if kind == stat.S_IFLNK else 4096
        mode = {stat.S_IFDIR: 0o755, stat.S_IFREG: 0o644, stat.S_IFLNK: 0o777}[kind]
        modified, read, changed = self._times(number, found)
        return Entry(
            number,
            kind | mode,
            1,
            0,
            0,
            size,
            sum(length for _, length in self._data(found, _EXTENTS_COUNTED)) if kind == stat.S_IFREG else size,
            modified,
            read,
            changed,
            attributed=False,
        )

    def names(self, number: int) -> dict[bytes, int]:
        """Return the names in a directory with their ids. Raises OSError."""
        known = self._names.get(number)
        if known is None:
            known = self._names[number] = dict(self._listed(number))
            if len(self._names) > _DIRECTORIES:
                self._names.popitem(last=False)
        self._names.move_to_end(number)
        return known

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Return bytes of a file, fewer only at its end. Raises OSError."""
        found = self._entry(number)
        length = min(length, int(found.size) - offset)
        return bytes(found.read_buffer_at_offset(length, offset)) if length > 0 else b""

    def link(self, number: int) -> bytes:
        """Return where a symbolic link points, with slashes. Raises OSError."""
        return str(self._entry(number).symbolic_link_target).replace("\\", "/").encode("utf-8", "surrogatepass")

    def xattrs(self, number: int) -> list[tuple[bytes, bytes | None]]:
        """Return none: there are none that Linux would know."""
        return []

    def data(self, number: int) -> Iterator[tuple[int, int]]:
        """Yield what is not a hole in a file as (offset, length). Raises OSError."""
        return self._data(self._entry(number), None)

    def _data(self, found: Any, limit: int | None) -> Iterator[tuple[int, int]]:
        size = int(found.size)
        if not size:
            return
        count = int(found.number_of_extents)
        if not count or (limit is not None and count > limit):
            yield 0, size
            return
        at = 0
        for index in range(count):
            _, length, flags = found.get_extent(index)
            length = min(length, size - at)
            if length > 0 and not flags & _SPARSE:
                yield at, length
            at += length
        if at < size:
            yield at, size - at

    def _listed(self, number: int) -> Iterator[tuple[bytes, int]]:
        directory = self._entry(number)
        opened, refused = set(), False
        for index in range(directory.number_of_sub_file_entries):
            try:
                found = directory.get_sub_file_entry(index)
                name = found.name
            except OSError:
                if self._spare is None:
                    raise
                refused = True
                continue
            lost = self._ntfs and found.is_empty()
            child = int(found.get_i30_file_reference()) & _MFT_MASK if lost else self._id(found)
            # NTFS's own files ($MFT ...) are none of the user's
            if not name or name in (".", "..") or (self._ntfs and child < _FIRST_USER_FILE):
                continue
            opened.add(child)
            if not lost:
                self._keep(child, found)
            yield name.replace("/", "\u2215").encode("utf-8", "surrogatepass"), child
        if refused and self._spare:
            for spare, child in self._spare.of(number).items():
                if child not in opened and child >= _FIRST_USER_FILE:
                    yield spare, child

    def _times(self, number: int, found: Any) -> tuple[int, int, int]:
        """Return when it was modified, read and changed, in nanoseconds since 1970; 0 when that is not known."""
        if self._ntfs:
            return _ns(found, "modification"), _ns(found, "access"), _ns(found, "entry_modification")
        # what libfsfat identifies a file by is the place of its directory entry; the root directory has none
        content = b"" if number == self.root_id else self._source.pread(number, _FAT_ENTRY_BYTES)
        if len(content) < _FAT_ENTRY_BYTES:
            return 0, 0, 0
        (read,) = struct.unpack_from("<H", content, 18)
        time, date = struct.unpack_from("<HH", content, 22)
        modified = _fat_ns(date, time)
        return modified, _fat_ns(read, 0), modified

    def _kind(self, number: int, found: Any) -> int:
        if number == self.root_id:
            return stat.S_IFDIR
        if self._ntfs:
            if found.has_directory_entries_index():
                return stat.S_IFLNK if found.symbolic_link_target else stat.S_IFDIR
            return stat.S_IFLNK if found.symbolic_link_target else stat.S_IFREG
        return stat.S_IFDIR if found.file_attribute_flags & _ATTRIBUTE_DIRECTORY else stat.S_IFREG

    def _id(self, found: Any) -> int:
        return int(found.file_reference) & _MFT_MASK if self._ntfs else int(found.identifier)

    def _entry(self, number: int) -> Any:
        found = self._open.get(number)
        if found is None:
            by_id = self._volume.get_file_entry if self._ntfs else self._volume.get_file_entry_by_identifier
            found = by_id(number)
            if self._ntfs and found.is_empty():
                raise OSError(errno.EIO, "its record in the file table is damaged")
            self._keep(number, found)
        else:
            self._open.move_to_end(number)
        return found

    def _keep(self, number: int, found: Any) -> None:
        self._open[number] = found
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)


def _fat_ns(date: int, time: int) -> int:
    try:
        when = datetime(
            1980 + (date >> 9), date >> 5 & 15, date & 31, time >> 11, time >> 5 & 63, 2 * (time & 31), tzinfo=UTC
        )
    except ValueError:
        return 0
    return int((when - _EPOCH).total_seconds()) * 10**9


def _ns(found: Any, which: str) -> int:
    """Return a time as nanoseconds since 1970, 0 when it is not set."""
    try:
        when = getattr(found, f"get_{which}_time")()
    except (OSError, ValueError):
        return 0
    return int((when.replace(tzinfo=UTC) - _EPOCH).total_seconds() * 1_000_000) * 1000 if when else 0
