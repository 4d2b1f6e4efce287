"""ext2/3/4 and XFS through libfsext and libfsxfs.

Runs in the confined process. The libraries give names as text only. Where a name is none (not UTF-8), ext's comes
from the Sleuth Kit, which gives bytes; XFS's has no library that would, and the entry is listed by its inode.
"""

from __future__ import annotations

import stat
import struct
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from clients.files.ranges import Bytes, FileObject
from clients.files.wire import Entry

_OPEN = 1024
_DIRECTORIES = 64
_EXTENTS_COUNTED = 256
_SPARSE = 1
_BLOCK_BYTES = 4096
_OLD_INODE_BYTES = 128
_EXTRA_INODE_BYTES = 32
_ATTRIBUTE_HEADER_BYTES = 8
_DEVICES = (stat.S_IFBLK, stat.S_IFCHR)


class PosixTree:
    """One file system; ids are inode numbers."""

    def __init__(self, library: Any, source: Bytes, raw_names: bool) -> None:
        """Open it. Raises OSError when it is damaged."""
        self._library = library
        self._volume = library.volume()
        self._volume.open_file_object(FileObject(source))
        self._source = source
        self._raw_names = raw_names
        self._sleuthkit: Any = None
        self._room = _attribute_room(source) if raw_names else None
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._names: OrderedDict[int, dict[bytes, int]] = OrderedDict()
        root = self._volume.get_root_directory()
        self.root_id = int(root.inode_number)
        self.label = str(self._volume.get_label() or "")
        self._keep(self.root_id, root)

    def entry(self, inode: int) -> Entry:
        """Return one inode. Raises OSError."""
        found = self._entry(inode)
        mode = int(found.file_mode)
        kind = stat.S_IFMT(mode)
        size = int(found.size) if kind in (stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR) else 0
        return Entry(
            inode,
            mode,
            int(found.number_of_links),
            int(found.owner_identifier),
            int(found.group_identifier),
            size,
            _in_blocks(self._data(found, _EXTENTS_COUNTED)) if kind == stat.S_IFREG else size,
            int(found.get_modification_time_as_integer()),
            int(found.get_access_time_as_integer()),
            int(found.get_inode_change_time_as_integer()),
            tuple(found.device_number or (0, 0)) if kind in _DEVICES else (0, 0),
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
        return str(self._entry(inode).symbolic_link_target).encode("utf-8", "surrogateescape")

    def xattrs(self, inode: int) -> list[tuple[bytes, bytes]]:
        """Return the extended attributes. Raises OSError."""
        if self._room is None:
            found = _attributes(self._entry(inode))
        else:
            # libfsext (20260821) gives an inode's attributes to the first who opens it, and none to the second
            volume = self._library.volume()
            volume.open_file_object(FileObject(self._source))
            found = _within(_attributes(volume.get_file_entry_by_inode(inode)), self._room)
        return [(name, _value(attribute)) for name, attribute in found]

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
        nameless = []
        for index in range(directory.number_of_sub_file_entries):
            found = directory.get_sub_file_entry(index)
            number = int(found.inode_number)
            try:
                listed[found.name.encode()] = number
            except (OSError, UnicodeEncodeError):
                nameless.append(number)
            self._keep(number, found)
        if nameless and self._raw_names:
            if self._sleuthkit is None:
                self._sleuthkit = _sleuthkit(self._source)
            listed = _raw_names(self._sleuthkit, inode)
        else:
            for number in nameless:
                name, copies = b"name-is-not-utf8.inode-%d" % number, 1
                while name in listed:
                    copies += 1
                    name = b"name-is-not-utf8.inode-%d.%d" % (number, copies)
                listed[name] = number
        return listed

    def _entry(self, inode: int) -> Any:
        found = self._open.get(inode)
        if found is None:
            found = self._volume.get_file_entry_by_inode(inode)
            self._keep(inode, found)
        else:
            self._open.move_to_end(inode)
        return found

    def _keep(self, inode: int, found: Any) -> None:
        self._open[inode] = found
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)


def _attribute_room(source: Bytes) -> int:
    """Return the bytes that ext keeps for attributes within an inode. Source: ext4's on-disk format, s_inode_size."""
    (inode_bytes,) = struct.unpack("<H", source.pread(1024 + 0x58, 2).ljust(2, b"\0"))
    return max(0, int(inode_bytes) - _OLD_INODE_BYTES - _EXTRA_INODE_BYTES - _ATTRIBUTE_HEADER_BYTES)


def _within(found: list[tuple[bytes, Any]], room: int) -> list[tuple[bytes, Any]]:
    """Return the attributes that surely lie within the inode.

    libfsext (up to its 20260821) reads the values of the others, which lie in a block of their own, from a wrong
    place: better none than a wrong one.
    """
    sizes = {name: 16 + _round(len(name.partition(b".")[2])) + _round(attribute.size) for name, attribute in found}
    small = [(name, attribute) for name, attribute in found if sizes[name] <= room]
    return small if sum(sizes[name] for name, _ in small) <= room else []


def _round(length: int) -> int:
    return -(-length // 4) * 4


def _attributes(found: Any) -> list[tuple[bytes, Any]]:
    return [(attribute.name.encode(), attribute) for attribute in found.extended_attributes]


def _value(attribute: Any) -> bytes:
    """Return an attribute's value; the library keeps a position between reads."""
    return bytes(attribute.read_buffer_at_offset(attribute.size, 0)) if attribute.size else b""


def _in_blocks(data: Iterator[tuple[int, int]]) -> int:
    """Return the bytes that data takes in blocks of 4 KiB."""
    return sum(-(-length // _BLOCK_BYTES) * _BLOCK_BYTES for _, length in data)


def sleuthkit_image(source: Bytes) -> Any:
    """Return bytes as what the Sleuth Kit reads from."""
    import pytsk3

    class Image(pytsk3.Img_Info):  # type: ignore[misc]
        """Reads from our bytes."""

        def __init__(self) -> None:
            super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

        def close(self) -> None:
            """Nothing of ours."""

        def read(self, offset: int, size: int) -> bytes:
            """Read a range."""
            return source.pread(offset, size)

        def get_size(self) -> int:
            """Return the size in bytes."""
            return source.size_bytes

    return Image()


def _sleuthkit(source: Bytes) -> Any:
    import pytsk3

    return pytsk3.FS_Info(sleuthkit_image(source), 0, pytsk3.TSK_FS_TYPE_EXT_DETECT)


def _raw_names(filesystem: Any, inode: int) -> dict[bytes, int]:
    import pytsk3

    names = {}
    for found in filesystem.open_dir(inode=inode):
        name = found.info.name
        allocated = int(name.flags) & int(pytsk3.TSK_FS_NAME_FLAG_ALLOC)
        invented = int(name.type) == int(pytsk3.TSK_FS_NAME_TYPE_VIRT_DIR)  # the Sleuth Kit's own $OrphanFiles
        if name.name not in (b".", b"..") and allocated and not invented:
            names[bytes(name.name)] = int(name.meta_addr)
    return names
