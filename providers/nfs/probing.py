"""What the file system under a pool can do: tried, not guessed.

Tried on files without names. Where those cannot be made (NFS, FUSE) they have one in `.frostgate` for a moment, the
same every time, so that nothing is left in the pool whenever we are killed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from providers.nfs import copying, layout, locks
from providers.nfs.beneath import close_all, directory, open_beneath

_PROBE = ".probe"
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)


def can_clone(root_fd: int) -> bool:
    """Tell whether the file system can clone files. Raises OSError."""
    with _two_files(root_fd) as (source, target):
        os.write(source, b"frostgate" * 1000)
        try:
            copying.clone(source, target)
        except OSError as error:
            if error.errno in copying.CANNOT:
                return False
            raise
    return True


@contextmanager
def _two_files(root_fd: int) -> Iterator[tuple[int, int]]:
    opened: list[int] = []
    try:
        try:
            for _ in range(2):
                opened.append(open_beneath(root_fd, ".", os.O_TMPFILE | os.O_RDWR, 0o600))
        except OSError as error:
            if error.errno not in _NO_UNNAMED:
                raise
            with locks.probing(root_fd), directory(layout.SNAPSHOTS, root_fd) as snapshots_fd:
                for _ in range(2):
                    layout.remove(snapshots_fd, _PROBE)
                    opened.append(open_beneath(snapshots_fd, _PROBE, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
                layout.remove(snapshots_fd, _PROBE)
        yield opened[0], opened[1]
    finally:
        close_all(opened)
