"""What a qcow2 header says of other files, read before QEMU may look at the image. Nothing else is parsed here.

Source: QEMU docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from providers.base import CapabilityMissing, InvalidName

MAGIC = b"QFI\xfb"
_V2_BYTES, _V3_BYTES = 72, 104
_DATA_FILE = 1 << 2
_BACKING_FORMAT = 0xE2792ACA
_MOST_EXTENSIONS = 64
_MOST_NAME_BYTES = 1023
_MOST_SIZE = 1 << 50  # 1 PiB: who walks through a disk that only its header makes larger would not come back


@dataclass(frozen=True, slots=True)
class Header:
    """`backing` is the backing file's name as it stands there, "" without one; `backing_format` "" when not said."""

    size_bytes: int
    backing: str
    backing_format: str


def header(descriptor: int, name: str) -> Header:
    """Read the header of an image; `name` is for messages.

    Raises InvalidName when it is no qcow2 image, CapabilityMissing when its data lie in another file, OSError.
    """
    head = os.pread(descriptor, _V3_BYTES, 0)
    if len(head) < _V2_BYTES or not head.startswith(MAGIC):
        raise InvalidName(f"{name} should be qcow2 but is not; say its format", volume=name)
    version, backing_at, backing_bytes, cluster_bits, size = struct.unpack_from(">IQIIQ", head, 4)
    if version not in (2, 3) or (version == 3 and len(head) < _V3_BYTES) or size > _MOST_SIZE:
        raise InvalidName(f"{name} is no qcow2 image that QEMU could open", volume=name)
    begin = _V2_BYTES
    if version == 3:
        if struct.unpack_from(">Q", head, 72)[0] & _DATA_FILE:
            raise CapabilityMissing(
                f"{name} keeps its data in another file, which is no part of the snapshot: "
                "convert it with `qemu-img convert -O qcow2`",
                volume=name,
            )
        begin = struct.unpack_from(">I", head, 100)[0]
    if not backing_at:
        return Header(size, "", "")
    if not 0 < backing_bytes <= _MOST_NAME_BYTES:
        raise InvalidName(f"the name of {name}'s backing file is too long", volume=name)
    if backing_at > 1 << min(cluster_bits, 21):
        raise InvalidName(f"{name} is no qcow2 image that QEMU could open", volume=name)
    backing = os.fsdecode(os.pread(descriptor, backing_bytes, backing_at))
    return Header(size, backing, _backing_format(descriptor, begin, backing_at))


def _backing_format(descriptor: int, position: int, end: int) -> str:
    for _ in range(_MOST_EXTENSIONS):
        head = os.pread(descriptor, 8, position)
        if position + 8 > end or len(head) < 8:
            break
        kind, length = struct.unpack(">II", head)
        if kind == 0:
            break
        if kind == _BACKING_FORMAT:
            return os.pread(descriptor, min(length, 15), position + 8).decode("ascii", "replace")
        position += 8 + (length + 7) // 8 * 8
    return ""
