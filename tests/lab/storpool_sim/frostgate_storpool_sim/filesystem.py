"""The FUSE file system below images/: one file for each device, read and written past the page cache.

Sizes do not change by writing, as those of block devices do not; truncation is ignored.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyfuse3
import trio

from frostgate_storpool_sim.cluster import Cluster, Device
from frostgate_storpool_sim.devices import Attached, Devices

T = TypeVar("T")


class DeviceFiles(pyfuse3.Operations):
    """Answers the kernel from the clusters."""

    def __init__(self, devices: Devices, cluster_of: Callable[[str], Cluster]) -> None:
        """Take what is attached, and which cluster a global id belongs to."""
        super().__init__()
        self._devices = devices
        self._cluster_of = cluster_of
        self._inodes: dict[str, int] = {}
        self._ids: dict[int, str] = {}
        self._owners: dict[str, tuple[int, int, int]] = {}
        """User, group and mode, where somebody changed them (libvirt does)."""
        self._open: dict[int, Attached] = {}
        self._next_handle = 1

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        """Find a device."""
        attached = self._devices.by_id.get(os.fsdecode(name))
        if parent_inode != pyfuse3.ROOT_INODE or attached is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(attached.device)

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        """Tell the attributes of a device, or of the directory."""
        if inode != pyfuse3.ROOT_INODE:
            return self._attributes(self._attached(inode).device)
        answer = pyfuse3.EntryAttributes()
        answer.st_ino = inode
        answer.st_mode = stat.S_IFDIR | 0o755
        answer.st_nlink = 2
        answer.attr_timeout = 0
        return answer

    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, fh: int | None, ctx: Any
    ) -> pyfuse3.EntryAttributes:
        """Change owner and mode; sizes stay."""
        device = self._attached(inode).device
        user, group, mode = self._owner(device)
        user = attr.st_uid if fields.update_uid else user
        group = attr.st_gid if fields.update_gid else group
        mode = stat.S_IMODE(attr.st_mode) if fields.update_mode else mode
        self._owners[device.global_id] = (user, group, mode)
        return self._attributes(device)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        """Open a device."""
        attached = self._attached(inode)
        device = attached.device
        if flags & (os.O_WRONLY | os.O_RDWR) and not device.writable:
            raise pyfuse3.FUSEError(errno.EROFS)
        handle = self._next_handle
        self._next_handle += 1
        self._open[handle] = attached
        self._devices.openers[attached] += 1
        return pyfuse3.FileInfo(fh=handle, direct_io=not device.snapshot, keep_cache=device.snapshot)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read; EIO when the device was detached by force."""
        device = self._held(fh)
        return _answered(lambda: self._cluster_of(device.global_id).read(device.global_id, off, size))

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write, within the size; EIO when the device was detached by force or made read-only."""
        device = self._held(fh)
        if not device.writable:
            raise pyfuse3.FUSEError(errno.EIO)
        return _answered(lambda: self._cluster_of(device.global_id).write(device.global_id, off, buf))

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Return when what was written is on the disk below."""
        device = self._held(fh)
        try:
            await trio.to_thread.run_sync(self._cluster_of(device.global_id).sync, device.global_id)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    async def flush(self, fh: int) -> None:
        """Nothing is held back."""

    async def release(self, fh: int) -> None:
        """Close a device."""
        self._devices.openers.subtract([self._open.pop(fh)])

    async def opendir(self, inode: int, ctx: Any) -> int:
        """Begin reading the directory."""
        if inode != pyfuse3.ROOT_INODE:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Tell the devices."""
        for position, (global_id, attached) in enumerate(sorted(self._devices.by_id.items())):
            if position >= start_id:
                attributes = self._attributes(attached.device)
                if not pyfuse3.readdir_reply(token, os.fsencode(global_id), attributes, position + 1):
                    return

    async def releasedir(self, fh: int) -> None:
        """End reading the directory."""

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Inode numbers are not used again."""

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        """Tell that there is such a file system."""
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_namemax = 255
        return answer

    def _attached(self, inode: int) -> Attached:
        try:
            return self._devices.by_id[self._ids[inode]]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    def _held(self, handle: int) -> Device:
        """What is open, as it is attached now; EIO when it was detached meanwhile."""
        opened = self._open[handle]
        now = self._devices.by_id.get(opened.device.global_id)
        if now != opened:
            raise pyfuse3.FUSEError(errno.EIO)
        return now.device

    def _owner(self, device: Device) -> tuple[int, int, int]:
        return self._owners.get(device.global_id, (os.getuid(), os.getgid(), 0o660 if device.writable else 0o440))

    def _attributes(self, device: Device) -> pyfuse3.EntryAttributes:
        inode = self._inodes.setdefault(device.global_id, pyfuse3.ROOT_INODE + 1 + len(self._inodes))
        self._ids[inode] = device.global_id
        answer = pyfuse3.EntryAttributes()
        answer.st_ino = inode
        answer.st_uid, answer.st_gid, mode = self._owner(device)
        answer.st_mode = stat.S_IFREG | mode
        answer.st_nlink = 1
        answer.st_size = device.size_bytes
        answer.st_blksize = 4096
        answer.st_blocks = device.size_bytes // 512
        answer.entry_timeout = answer.attr_timeout = 0
        return answer


def _answered(work: Callable[[], T]) -> T:
    try:
        return work()
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
