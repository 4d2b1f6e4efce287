"""Image files as volumes: their format, and the size that the guest sees.

The format comes from the caller, the name's suffix or the pool's configuration, never from the content: a
guest could write a qcow2 header into its raw disk and read any file of the host through it.
"""

from __future__ import annotations

import os
from typing import Literal, TypeAlias, get_args

from providers.base import InvalidName
from providers.nfs import qcow2

Format: TypeAlias = Literal["raw", "qcow2"]
FORMATS: tuple[str, ...] = get_args(Format)


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

    Raises InvalidName when a file that should be qcow2 is not, CapabilityMissing when its data lie elsewhere.
    """
    if image_format == "raw":
        return os.fstat(descriptor).st_size
    return qcow2.header(descriptor, name).size_bytes
