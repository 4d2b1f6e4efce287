"""Image files as volumes: their format, and the size that the guest sees.

The format comes from the caller, the name's suffix or the pool's configuration, never from the content: a
guest could write a qcow2 header into its raw disk and read any file of the host through it.
"""

from __future__ import annotations

import os
import struct
from typing import Literal, TypeAlias, get_args

from providers.base import InvalidName

Format: TypeAlias = Literal["raw", "qcow2"]
FORMATS: tuple[str, ...] = get_args(Format)

_QCOW2_MAGIC = b"QFI\xfb"
_QCOW2_SIZE_OFFSET = 24


def format_of(name: str, asked: str | None, default: Format) -> str:
    """Return a volume's format. Raises InvalidName for one that is not known."""
    if asked:
        if asked not in FORMATS:
            raise InvalidName(f"format {asked!r} is not one of {', '.join(FORMATS)}", volume=name)
        return asked
    suffix = name.rpartition(".")[2]
    return suffix if suffix in FORMATS else default


def virtual_size(descriptor: int, name: str, image_format: str) -> int:
    """Return the size that the guest sees, in bytes.

    Raises InvalidName when a file that should be qcow2 is not. Source: QEMU docs/interop/qcow2.txt, header.
    """
    if image_format == "raw":
        return os.fstat(descriptor).st_size
    header = os.pread(descriptor, 32, 0)
    if len(header) < 32 or not header.startswith(_QCOW2_MAGIC):
        raise InvalidName(f"volume {name} should be qcow2 but is not; say its format", volume=name)
    size: int = struct.unpack_from(">Q", header, _QCOW2_SIZE_OFFSET)[0]
    return size
