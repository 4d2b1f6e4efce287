"""The extended attributes of ext2/3/4, through e2fsprogs' libext2fs. Runs in the confined process.

libfsext (up to its 20260821) reads wrongly those that lie outside the inode; libext2fs is what e2fsck itself goes by.
It has no Python binding; the few calls are made by ctypes, and it reads through an I/O manager of ours.
Source: e2fsprogs 1.47, lib/ext2fs/ext2fs.h and ext2_io.h.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_long, c_size_t, c_uint, c_uint32, c_ulonglong, c_void_p
from functools import cache

from clients.files.ranges import Bytes

_BASE = 2133571328  # of the error table, from which the magic numbers are counted
_MAGIC_CHANNEL, _MAGIC_MANAGER, _CANNOT = _BASE + 5, _BASE + 7, _BASE + 32
_FLAGS = 0x8000 | 0x20000 | 0x100000 | 0x200000  # soft features, 64 bits, no MMP, checksums not looked at
_FIRST_BLOCK_BYTES = 1024
_MOST_BYTES = 1024 * 1024
_ACCESS_LISTS = b"system.posix_acl_"
_OF_SOMEBODY = (0x02, 0x08)  # ACL_USER, ACL_GROUP

_OPEN = CFUNCTYPE(c_long, c_char_p, c_int, POINTER(c_void_p))
_CHANNEL = CFUNCTYPE(c_long, c_void_p)
_SET_SIZE = CFUNCTYPE(c_long, c_void_p, c_int)
_READ = CFUNCTYPE(c_long, c_void_p, c_ulonglong, c_int, c_void_p)
_ATTRIBUTE = CFUNCTYPE(c_int, c_char_p, c_void_p, c_size_t, c_void_p)


class _Manager(ctypes.Structure):
    _fields_ = (
        ("magic", c_long),
        ("name", c_char_p),
        ("open", _OPEN),
        ("close", _CHANNEL),
        ("set_blksize", _SET_SIZE),
        ("read_blk", _READ),
        ("write_blk", c_void_p),
        ("flush", _CHANNEL),
        ("write_byte", c_void_p),
        ("set_option", c_void_p),
        ("get_stats", c_void_p),
        ("read_blk64", _READ),
        ("unused", c_void_p * 4),
        ("reserved", c_long * 14),
    )


class _Channel(ctypes.Structure):
    _fields_ = (
        ("magic", c_long),
        ("manager", POINTER(_Manager)),
        ("name", c_char_p),
        ("block_size", c_int),
        ("read_error", c_void_p),
        ("write_error", c_void_p),
        ("refcount", c_int),
        ("flags", c_int),
        ("reserved", c_long * 14),
        ("private_data", c_void_p),
        ("app_data", c_void_p),
        ("align", c_int),
    )


@cache
def load() -> ctypes.CDLL:
    """Load libext2fs; first called before confine(), as it opens files. Raises OSError when it is not there."""
    library = ctypes.CDLL("libext2fs.so.2")
    library.ext2fs_open2.argtypes = [
        c_char_p, c_char_p, c_int, c_int, c_uint, POINTER(_Manager), POINTER(c_void_p),
    ]  # fmt: skip
    library.ext2fs_xattrs_open.argtypes = [c_void_p, c_uint32, POINTER(c_void_p)]
    library.ext2fs_xattrs_read.argtypes = [c_void_p]
    library.ext2fs_xattrs_iterate.argtypes = [c_void_p, _ATTRIBUTE, c_void_p]
    library.ext2fs_xattr_get.argtypes = [c_void_p, c_char_p, POINTER(c_void_p), POINTER(c_size_t)]
    library.ext2fs_xattrs_close.argtypes = [POINTER(c_void_p)]
    library.ext2fs_free_mem.argtypes = [c_void_p]
    library.ext2fs_inode_table_loc.argtypes = [c_void_p, c_uint]
    library.ext2fs_inode_table_loc.restype = c_ulonglong
    for name in ("open2", "xattrs_open", "xattrs_read", "xattrs_iterate", "xattr_get", "xattrs_close", "free_mem"):
        getattr(library, f"ext2fs_{name}").restype = c_long
    _CHANNEL(lambda _: 0)  # the first callback of a process opens files as well
    return library


class ExtAttributes:
    """The extended attributes of one file system; opened when first asked, and open until the process ends."""

    def __init__(self, source: Bytes) -> None:
        """Take its bytes."""
        self._library = load()
        self._source = source
        self._manager = _Manager(
            magic=_MAGIC_MANAGER,
            name=b"bytes",
            open=_OPEN(self._opened),
            close=_CHANNEL(lambda _: 0),
            set_blksize=_SET_SIZE(self._sized),
            read_blk=_READ(self._read),
            flush=_CHANNEL(lambda _: 0),
            read_blk64=_READ(self._read),
        )
        self._channel = _Channel(
            magic=_MAGIC_CHANNEL,
            manager=ctypes.pointer(self._manager),
            name=b"bytes",
            block_size=_FIRST_BLOCK_BYTES,
            refcount=1,
        )
        self._filesystem = c_void_p()

    def may_have(self, found: object) -> bool:
        """Not known without asking: libfsext counts them for the first who opens an inode, and none for others."""
        return True

    def of(self, inode: int, found: object = None) -> list[tuple[bytes, bytes | None]]:
        """Return an inode's attributes as Linux names them. Raises OSError, also when the file system is damaged."""
        self._open()
        attributes: list[tuple[bytes, bytes | None]] = []

        def take(name: bytes, value: int | None, length: int, _: object) -> int:
            if length <= _MOST_BYTES:
                attributes.append((name, ctypes.string_at(value, length) if value and length else b""))
            return 0

        handle = c_void_p()
        _check(self._library.ext2fs_xattrs_open(self._filesystem, inode, byref(handle)))
        try:
            _check(self._library.ext2fs_xattrs_read(handle))
            _check(self._library.ext2fs_xattrs_iterate(handle, _ATTRIBUTE(take), None))
            # access lists are another thing on disk than for Linux's calls; asked for by name they are converted
            return [
                (name, self._named(handle, name) if name.startswith(_ACCESS_LISTS) else value)
                for name, value in attributes
            ]
        finally:
            self._library.ext2fs_xattrs_close(byref(handle))

    def table_block(self, group: int) -> int:
        """Return the block at which the inodes of a group, which must be one, begin. Raises OSError."""
        self._open()
        return int(self._library.ext2fs_inode_table_loc(self._filesystem, group))

    def _open(self) -> None:
        if not self._filesystem:
            opened = byref(self._filesystem)
            _check(self._library.ext2fs_open2(b"bytes", None, _FLAGS, 0, 0, byref(self._manager), opened))

    def _named(self, handle: c_void_p, name: bytes) -> bytes:
        value, length = c_void_p(), c_size_t()
        _check(self._library.ext2fs_xattr_get(handle, name, byref(value), byref(length)))
        try:
            return _as_the_kernel_says(ctypes.string_at(value, min(length.value, _MOST_BYTES)))
        finally:
            self._library.ext2fs_free_mem(byref(value))

    def _opened(self, name: bytes, flags: int, channel: ctypes._Pointer[c_void_p]) -> int:
        channel[0] = ctypes.addressof(self._channel)
        return 0

    def _sized(self, channel: int, size: int) -> int:
        self._channel.block_size = size
        return 0

    def _read(self, channel: int, block: int, count: int, into: int) -> int:
        """Read `count` blocks, or `-count` bytes. An exception cannot leave a callback."""
        length = -count if count < 0 else count * self._channel.block_size
        try:
            content = self._source.pread(block * self._channel.block_size, length)
        except OSError as error:
            return error.errno or errno.EIO
        ctypes.memmove(into, content, len(content))
        return 0 if len(content) == length else _CANNOT


def _as_the_kernel_says(access_list: bytes) -> bytes:
    """Give the entries of no user or group of their own the id that Linux gives them, where libext2fs has 0."""
    said = access_list[:4]
    for at in range(4, len(access_list) - 7, 8):
        tag, rights, number = struct.unpack_from("<HHI", access_list, at)
        said += struct.pack("<HHI", tag, rights, number if tag in _OF_SOMEBODY else 0xFFFFFFFF)
    return said


def _check(code: int) -> None:
    if code:
        raise OSError(errno.EIO, f"libext2fs: error {code}")
