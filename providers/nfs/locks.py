"""Locks between the gateways that share a pool: nobody works on a group, or reverts a volume, that another works on.

They are open-file-description locks on single bytes of `.frostgate/.lock`, one byte a name (its SHA-256 says which),
so nothing of them has to be cleaned up: the kernel, or over NFSv4 the server, ends them with the process that has
them. The file stays, because a lock on a file that was removed excludes nobody. A file system without locks excludes
nobody either (NFSv3 mounted with nolock).

    a group    exclusively, by whoever makes, settles, reverts to or deletes it; shared by who clones or describes it,
               which only one does at a time
    a volume   shared from prepare to the cut; exclusively from the staging of a revert to its end
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from providers.base import GroupBusy, PoolUnavailable, VolumeInUse
from providers.nfs import imagelock, layout
from providers.nfs.beneath import close_all, directory, open_beneath

_LOCK = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES)
_PATIENCE_S = 1.0
"""How long somebody may have a lock before he is said to: a verb of a moment, or a process of ours that has been
forked and has not yet closed what it must not have."""


class Held:
    """Locks that last until close()."""

    def __init__(self, descriptor: int) -> None:
        """Take a descriptor of the lock file, over."""
        self._descriptor = descriptor

    def close(self) -> None:
        """End the locks. Repeatable."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            close_all([descriptor])  # on a stale mount the server has ended them already

    def __enter__(self) -> Self:
        """Enter: itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Exit: close()."""
        self.close()


def group(root_fd: int, name: str) -> Held:
    """Keep other gateways from a group. Makes `.frostgate`. Raises GroupBusy, OSError."""
    try:
        return _lock(root_fd, exclusive=[f"group:{name}"])
    except BlockingIOError:
        raise _busy(name) from None


def within_group(root_fd: int, name: str, work: str, *, is_ours: bool) -> Held:
    """Keep other gateways from removing a group, and from the same work on it; `is_ours` when the group is locked.

    Makes `.frostgate`. Raises GroupBusy, OSError.
    """
    try:
        return _lock(root_fd, shared=[] if is_ours else [f"group:{name}"], exclusive=[f"{work}:{name}"])
    except BlockingIOError:
        raise _busy(name) from None


def _busy(name: str) -> GroupBusy:
    return GroupBusy(f"another gateway of this pool works on group snapshot {name}; try again later", group=name)


def volumes(root_fd: int, names: Sequence[str], *, reverting: bool) -> Held:
    """Keep other gateways from reverting volumes and, when they are to be reverted here, from snapshots of them.

    Raises VolumeInUse, OSError.
    """
    for_error = ", ".join(names)
    try:
        keys = [f"volume:{name}" for name in names]
        return _lock(root_fd, exclusive=keys) if reverting else _lock(root_fd, shared=keys)
    except BlockingIOError:
        raise VolumeInUse(
            f"another gateway of this pool is at work on a volume of {for_error}; try again later",
            volume=for_error,
            users="another gateway",
        ) from None


def probing(root_fd: int) -> Held:
    """Wait until no other gateway tries what the file system can. Raises OSError."""
    return _lock(root_fd, exclusive=["probe"], wait=True)


def is_held(root_fd: int, name: str) -> bool:
    """Tell whether somebody, ourselves included, works on a group. Raises OSError."""
    try:
        descriptor = open_beneath(root_fd, f"{layout.SNAPSHOTS}/{_LOCK}", os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return imagelock.is_locked(descriptor, _byte(f"group:{name}"))
    finally:
        os.close(descriptor)


def _lock(root_fd: int, *, shared: Sequence[str] = (), exclusive: Sequence[str] = (), wait: bool = False) -> Held:
    """Take all or none. Raises BlockingIOError when somebody has one of them, OSError."""
    layout.make_directory(root_fd, layout.SNAPSHOTS)
    deadline = time.monotonic() + _PATIENCE_S
    with directory(layout.SNAPSHOTS, root_fd) as snapshots_fd:
        while True:
            descriptor = _open(snapshots_fd)
            try:
                for name in shared:
                    imagelock.lock(descriptor, _byte(name))
                for name in exclusive:
                    imagelock.lock(descriptor, _byte(name), exclusive=True, wait=wait)
                if _is_current(snapshots_fd, descriptor):
                    return Held(descriptor)
            except OSError as error:
                if error.errno in imagelock.NO_LOCKS:
                    return Held(descriptor)
                close_all([descriptor])
                if error.errno not in _TAKEN:
                    raise
                if time.monotonic() > deadline:
                    raise BlockingIOError(errno.EAGAIN, "locked by another gateway") from None
                time.sleep(0.02)
                continue
            close_all([descriptor])  # somebody removed `.frostgate` meanwhile: lock what the others lock


def _open(snapshots_fd: int) -> int:
    try:
        descriptor = open_beneath(snapshots_fd, _LOCK, os.O_RDWR | os.O_NONBLOCK)
    except FileNotFoundError:
        os.close(open_beneath(snapshots_fd, _LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600))
        # a power cut of the server alone must not take the file away from those who have locked it
        os.fsync(snapshots_fd)
        descriptor = open_beneath(snapshots_fd, _LOCK, os.O_RDWR | os.O_NONBLOCK)
    try:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        close_all([descriptor])
        raise
    if not is_file:
        os.close(descriptor)
        raise PoolUnavailable(f"{layout.SNAPSHOTS}/{_LOCK} is not a regular file; remove it")
    return descriptor


def _is_current(snapshots_fd: int, descriptor: int) -> bool:
    try:
        current = os.stat(_LOCK, dir_fd=snapshots_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (current.st_dev, current.st_ino) == (ours.st_dev, ours.st_ino)


def _byte(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8]) >> 2
