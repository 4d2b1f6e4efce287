"""The extended attributes of XFS, through libfsxfs, as Linux names and shows them. Runs in the confined process.

Source: xfs_acl.h (struct xfs_acl), posix_acl_xattr.h.
"""

from __future__ import annotations

import struct
from typing import Any

from clients.files.ranges import Bytes

_SECURITY = b"secure."  # libfsxfs's word for it
_ACCESS_LISTS = {
    b"trusted.SGI_ACL_FILE": b"system.posix_acl_access",
    b"trusted.SGI_ACL_DEFAULT": b"system.posix_acl_default",
}
_OF_SOMEBODY = (0x02, 0x08)  # ACL_USER, ACL_GROUP
_LINUX_VERSION = 2


class XfsAttributes:
    """The extended attributes of one file system."""

    def __init__(self, source: Bytes) -> None:
        """Take its bytes."""

    def may_have(self, found: Any) -> bool:
        """Tell whether an inode, which libfsxfs has opened, has any. Raises OSError."""
        return int(found.number_of_extended_attributes) > 0

    def of(self, inode: int, found: Any) -> list[tuple[bytes, bytes | None]]:
        """Return the attributes of an inode, which libfsxfs has opened; None for a value that it cannot read.

        Those are values of more than about a block. Raises OSError.
        """
        attributes: list[tuple[bytes, bytes | None]] = []
        for attribute in found.extended_attributes:
            name = attribute.name.encode()
            if name.startswith(_SECURITY):
                name = b"security." + name.removeprefix(_SECURITY)
            value = _value(attribute)
            attributes.append((name, value))
            if name in _ACCESS_LISTS and value:
                attributes.append((_ACCESS_LISTS[name], _access_list(value)))
        return attributes


def _value(attribute: Any) -> bytes | None:
    try:
        # from its beginning: the library keeps a position between reads
        return bytes(attribute.read_buffer_at_offset(attribute.size, 0)) if attribute.size else b""
    except OSError:
        return None


def _access_list(value: bytes) -> bytes:
    """Return an access list as Linux's calls give it."""
    count = int.from_bytes(value[:4], "big")
    said = struct.pack("<I", _LINUX_VERSION)
    for at in range(4, min(len(value) - 11, 4 + 12 * count), 12):
        tag, number, rights = struct.unpack_from(">IIH", value, at)
        said += struct.pack("<HHI", tag & 0xFFFF, rights, number if tag in _OF_SOMEBODY else 0xFFFFFFFF)
    return said
