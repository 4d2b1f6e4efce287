"""QEMU's image locks: who uses a volume, and keeping it from being written while we copy.

QEMU takes open-file-description locks on single bytes of an image: byte 100 + N is held by whoever has
permission N, byte 200 + N by whoever does not share it (block/file-posix.c: RAW_LOCK_PERM_BASE,
RAW_LOCK_SHARED_BASE). Over NFSv4 the server keeps these locks, so a VM on another host is seen as well.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import psutil

from providers.base import VolumeInUse

_F_OFD_GETLK, _F_OFD_SETLK, _F_OFD_SETLKW = 36, 37, 38
_CONSISTENT_READ, _WRITE, _RESIZE = 100, 101, 103
_KEEP_WRITE, _KEEP_RESIZE = 201, 203
_FLOCK = "hhqqi4x"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without locks answers."""


def is_in_use(descriptor: int) -> bool:
    """Tell whether somebody else has the image open for writing.

    A file system without locks (NFSv3 mounted with nolock) knows of nobody.
    """
    return is_locked(descriptor, _WRITE) or is_locked(descriptor, _RESIZE)


def hold(descriptor: int, volume: str) -> None:
    """Keep everybody from opening the image for writing, until the descriptor is closed; readers are welcome.

    As `qemu-img convert` does. Raises VolumeInUse, naming who, when somebody has it open for writing, or does
    not let us read.
    """
    try:
        for byte in (_CONSISTENT_READ, _KEEP_WRITE, _KEEP_RESIZE):
            lock(descriptor, byte)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise in_use(descriptor, volume) from None
        raise
    if is_in_use(descriptor):
        raise in_use(descriptor, volume)


def in_use(descriptor: int, volume: str) -> VolumeInUse:
    """Return the error that names who uses the volume."""
    named = ", ".join(users(descriptor)) or "somebody on another host"
    return VolumeInUse(f"volume {volume} is in use by {named}; stop it first", volume=volume, users=named)


def users(descriptor: int) -> tuple[str, ...]:
    """Return in words which QEMU processes of this host have the file open: "VM web1 (pid 4711)"."""
    status = os.fstat(descriptor)
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if not (process.info["name"] or "").startswith("qemu"):
            continue
        if _has_open(process.pid, (status.st_dev, status.st_ino)):
            found.append(f"{_named(process.info['name'], process.info['cmdline'] or ())} (pid {process.pid})")
    return tuple(sorted(found))


def lock(descriptor: int, byte: int, *, exclusive: bool = False, wait: bool = False) -> None:
    """Lock one byte of a file until the descriptor (and what was dup()ed from it) is closed.

    Raises OSError: EAGAIN or EACCES when somebody else has it, one of NO_LOCKS when there are no locks. `wait` waits.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    fcntl.fcntl(descriptor, _F_OFD_SETLKW if wait else _F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))


def is_locked(descriptor: int, byte: int) -> bool:
    """Tell whether somebody else has a lock on a byte; a file system without locks says no. Raises OSError."""
    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        answer = fcntl.fcntl(descriptor, _F_OFD_GETLK, question)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def _has_open(pid: int, inode: tuple[int, int]) -> bool:
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            try:
                status = Path(entry.path).stat()
            except OSError:
                continue  # closed meanwhile, or a socket
            if (status.st_dev, status.st_ino) == inode:
                return True
    except OSError:
        return False  # ended meanwhile
    return False


def _named(program: str, command: Iterable[str]) -> str:
    """Return the VM's name from QEMU's command line as libvirt writes it: -name guest=web1,debug-threads=on."""
    words = iter(command)
    for word in words:
        if word == "-name":
            options = next(words, "").split(",")
            for option in options:
                if option.startswith("guest="):
                    return f"VM {option.removeprefix('guest=')}"
            return f"VM {options[0]}"
    return program
