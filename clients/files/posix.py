"""ext2/3/4 and XFS through libfsext and libfsxfs.

Runs in the confined process. The libraries give names as text only, and of inodes that they can read. Where a
directory has another one, ext's names come from the Sleuth Kit, which gives bytes, and XFS's from a module of ours.
Attributes of ext come from libext2fs.
"""

from __future__ import annotations

import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from clients.files.ext_attributes import ExtAttributes
from clients.files.far_times import FarTimes, Inodes
from clients.files.ranges import Bytes, FileObject
from clients.files.sleuthkit_names import SleuthkitNames
from clients.files.wire import Entry
from clients.files.xfs_attributes import XfsAttributes
from clients.files.xfs_names import XfsNames

_OPEN = 4096
_DIRECTORIES = 64
_EXTENTS_COUNTED = 256
_SPARSE = 1
_BLOCK_BYTES = 4096
_DEVICES = (stat.S_IFBLK, stat.S_IFCHR)


class PosixTree:
    """One file system; ids are inode numbers."""

    def __init__(
        self,
        library: Any,
        source: Bytes,
        names: SleuthkitNames | XfsNames,
        attributes: ExtAttributes | XfsAttributes,
        inodes: Inodes,
    ) -> None:
        """Open it; `names` and `inodes` know those that the library cannot give.

        Raises OSError when it is damaged.
        """
        self._times = FarTimes(source, inodes)
        self._volume = library.volume()
        self._volume.open_file_object(FileObject(self._times))
        self._bytes = names
        self._attributes = attributes
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._names: OrderedDict[int, dict[bytes, int]] = OrderedDict()
        root = self._times.opened(None, self._volume.get_root_directory)
        self.root_id = int(root.inode_number)
        self.label = str(self._volume.get_label() or "")
        self._keep(self.root_id, root)

    def entry(self, inode: int) -> Entry:
        """Return one inode. Raises OSError."""
        found = self._entry(inode)
        mode = int(found.file_mode)
        kind = stat.S_IFMT(mode)
        size = int(found.size) if kind in (stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR) else 0
        times = self._times.of(
            inode,
            int(found.get_modification_time_as_integer()),
            int(found.get_access_time_as_integer()),
            int(found.get_inode_change_time_as_integer()),
        )
        return Entry(
            inode,
            mode,
            int(found.number_of_links),
            int(found.owner_identifier),
            int(found.group_identifier),
            size,
            _in_blocks(self._data(found, _EXTENTS_COUNTED)) if kind == stat.S_IFREG else size,
            *times,
            tuple(found.device_number or (0, 0)) if kind in _DEVICES else (0, 0),
            self._attributes.may_have(found),
        )

    def names(self, inode: int) -> dict[bytes, int]:
        """Return the names in a directory with their inodes, "." and ".." left out. Raises OSError."""
        known = self._names.get(inode)
        if known is None:
            known = self._names[inode] = self._listed(inode)
            if len(self._names) > _DIRECTORIES:
                self._names.popitem(last=False)
        self._names.move_to_end(inode)
        return known

    def read(self, inode: int, offset: int, length: int) -> bytes:
        """Return bytes of a file, fewer only at its end. Raises OSError."""
        found = self._entry(inode)
        length = min(length, int(found.size) - offset)
        return bytes(found.read_buffer_at_offset(length, offset)) if length > 0 else b""

    def link(self, inode: int) -> bytes:
        """Return where a symbolic link points. Raises OSError."""
        found = self._entry(inode)
        with suppress(OSError, UnicodeEncodeError):
            if target := found.symbolic_link_target:
                return str(target).encode()
        return self._bytes.target(inode, int(found.size))

    def xattrs(self, inode: int) -> list[tuple[bytes, bytes | None]]:
        """Return the extended attributes, None for a value that cannot be read. Raises OSError."""
        return self._attributes.of(inode, self._entry(inode))

    def data(self, inode: int) -> Iterator[tuple[int, int]]:
        """Yield what is not a hole in a file as (offset, length). Raises OSError."""
        return self._data(self._entry(inode), None)

    def _data(self, found: Any, limit: int | None) -> Iterator[tuple[int, int]]:
        size = int(found.size)
        if not size:
            return
        try:
            count = int(found.number_of_extents)
        except OSError:
            count = 0
        if not count or (limit is not None and count > limit):
            # inline data has no extents; too many are not worth counting
            yield 0, size
            return
        at = 0
        for index in range(count):
            _, length, flags = found.get_extent(index)
            length = min(length, size - at)
            if length > 0 and not flags & _SPARSE:
                yield at, length
            at += length

    def _listed(self, inode: int) -> dict[bytes, int]:
        directory = self._entry(inode)
        listed: dict[bytes, int] = {}
        for index in range(directory.number_of_sub_file_entries):
            try:
                found = directory.get_sub_file_entry(index)
                number = int(found.inode_number)
                listed[found.name.encode()] = number
            except (OSError, UnicodeEncodeError):
                # one name that is not UTF-8, or one inode that the library refuses
                return self._bytes.of(inode, directory)
            self._keep(number, found)
        return listed

    def _entry(self, inode: int) -> Any:
        found = self._open.get(inode)
        if found is None:
            found = self._times.opened(inode, lambda: self._volume.get_file_entry_by_inode(inode))
            self._keep(inode, found)
        else:
            self._open.move_to_end(inode)
        return found

    def _keep(self, inode: int, found: Any) -> None:
        self._open[inode] = found
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)


def _in_blocks(data: Iterator[tuple[int, int]]) -> int:
    """Return the bytes that data takes in blocks of 4 KiB."""
    return sum(-(-length // _BLOCK_BYTES) * _BLOCK_BYTES for _, length in data)
