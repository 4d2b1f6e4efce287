"""Directories below one that the operator named, opened step by step: no link on the way is followed.

What is below it may have come out of an untrusted snapshot earlier, so that a name there leads wherever the guest
wanted it to; and it may belong to a user of this host whose number the guest chose.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

Parts = tuple[bytes, ...]
"""A path below the named directory, name by name."""

_DEEPEST = 2048  # no path that the kernel takes has more names
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Beneath:
    """A directory that the operator named, links in its own path being followed. Use it in a `with` block."""

    def __init__(self, top: Path) -> None:
        """Open it. Raises OSError."""
        self._top = os.open(top, _DIRECTORY)
        self._kept: tuple[Parts, int] | None = None

    @contextmanager
    def opened(self, parts: Parts) -> Iterator[int]:
        """Open a directory below, or with no parts the named one itself. Raises OSError, also for a link."""
        descriptor = self._open(parts)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def directory(self, parts: Parts) -> int:
        """Return opened()'s descriptor, which stays open until another directory is asked for. Raises OSError."""
        if self._kept is None or self._kept[0] != parts:
            self._close_kept()
            self._kept = parts, self._open(parts)
        return self._kept[1]

    def close(self) -> None:
        """Close what is open."""
        self._close_kept()
        os.close(self._top)

    def _open(self, parts: Parts) -> int:
        if len(parts) > _DEEPEST:
            raise OSError(errno.ENAMETOOLONG, "the directory is too deep")
        descriptor = os.dup(self._top)
        for part in parts:
            try:
                below = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            finally:
                os.close(descriptor)
            descriptor = below
        return descriptor

    def _close_kept(self) -> None:
        if self._kept:
            os.close(self._kept[1])
            self._kept = None

    def __enter__(self) -> Self:
        """Enter: the directory itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Exit: close()."""
        self.close()


def status(parent: int, name: bytes) -> os.stat_result | None:
    """Return what has a name in a directory, a link as itself; None if nothing has it. Raises OSError."""
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None


@contextmanager
def itself(parent: int, name: bytes) -> Iterator[int]:
    """Open what has a name in a directory, of whatever kind and mode, without using it. Raises OSError."""
    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def handle(descriptor: int) -> str:
    """Return a path to what itself() opened, for calls that take no such descriptor; it leads nowhere else."""
    return f"/proc/self/fd/{descriptor}"
