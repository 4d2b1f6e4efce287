"""The FUSE side: answers requests from a Disk, records what changes it, fails or hangs where it is told to.

It is told, and asked, by reading extended attributes "user.powercut:ORDER" of the mounted directory (mount.py): reading
one needs no lock of the directory, which a call that hangs may have.
Nothing is cached by the kernel, so every system call comes here.
"""

import errno
import json
import os
import pickle
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from tests.lab.powercut.disk import (
    ROOT,
    Attributes,
    Disk,
    Mark,
    Names,
    Node,
    Operation,
    Sync,
    Truncate,
    Write,
    Xattr,
)

CONTROL = "user.powercut:"
_NAMES = ("create", "mkdir", "rename", "link", "unlink", "rmdir", "fsyncdir")
CHANGING = frozenset((*_NAMES, "write", "truncate", "setattr", "setxattr", "removexattr", "fsync"))


class Recorded(pyfuse3.Operations):
    """A file system of one Disk."""

    enable_writeback_cache = False

    def __init__(self) -> None:
        super().__init__()
        self._disk = Disk()
        self._base = Disk()
        self._saved: dict[str, Disk] = {}
        self._operations: list[Operation] = []
        self._next_inode = ROOT + 1
        self._calls: list[str] = []
        self._fault: dict[str, Any] = {}
        self._hanging = trio.Event()
        self._is_hanging = False

    # requests about names

    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext | None = None) -> Any:
        await self._called("lookup")
        return self._attributes(self._child(parent, os.fsdecode(name)))

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext) -> Any:
        await self._called("create")
        inode = self._make("create", parent, os.fsdecode(name), stat.S_IFREG | stat.S_IMODE(mode), ctx)
        return self._opened(inode), self._attributes(inode)

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> Any:
        await self._called("mkdir")
        return self._attributes(self._make("mkdir", parent, os.fsdecode(name), stat.S_IFDIR | stat.S_IMODE(mode), ctx))

    async def unlink(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._called("unlink")
        self._child(parent, os.fsdecode(name))
        self._do(Names("unlink", ((parent, os.fsdecode(name), None),)))

    async def rmdir(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._called("rmdir")
        if self._node(self._child(parent, os.fsdecode(name))).entries:
            raise pyfuse3.FUSEError(errno.ENOTEMPTY)
        self._do(Names("rmdir", ((parent, os.fsdecode(name), None),)))

    async def rename(
        self, old: int, old_name: bytes, new: int, new_name: bytes, flags: int, ctx: pyfuse3.RequestContext
    ) -> None:
        await self._called("rename")
        source, target = os.fsdecode(old_name), os.fsdecode(new_name)
        inode = self._child(old, source)
        replaced = self._node(new).entries.get(target)
        if flags & 1 and replaced is not None:  # RENAME_NOREPLACE
            raise pyfuse3.FUSEError(errno.EEXIST)
        if flags & ~1:
            raise pyfuse3.FUSEError(errno.EINVAL)
        if replaced != inode:  # two names of one file: rename(2) does nothing
            self._do(Names("rename", ((old, source, None), (new, target, inode))))

    async def link(self, inode: int, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> Any:
        await self._called("link")
        if os.fsdecode(name) in self._node(parent).entries:
            raise pyfuse3.FUSEError(errno.EEXIST)
        self._do(Names("link", ((parent, os.fsdecode(name), inode),)))
        return self._attributes(inode)

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        await self._called("opendir")
        return inode

    async def readdir(self, handle: int, start: int, token: pyfuse3.ReaddirToken) -> None:
        await self._called("readdir")
        for number, (name, inode) in enumerate(sorted(self._node(handle).entries.items())):
            if number < start:
                continue
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self._attributes(inode), number + 1):
                return

    # requests about inodes

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext | None = None) -> pyfuse3.EntryAttributes:
        await self._called("getattr")
        return self._attributes(inode)

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        await self._called("truncate" if fields.update_size else "setattr")
        if fields.update_size:
            self._do(Truncate(inode, attr.st_size, time.time_ns()))
        if fields.update_mode or fields.update_uid or fields.update_gid or fields.update_mtime:
            self._do(
                Attributes(
                    inode,
                    attr.st_mode if fields.update_mode else None,
                    attr.st_uid if fields.update_uid else None,
                    attr.st_gid if fields.update_gid else None,
                    attr.st_mtime_ns if fields.update_mtime else None,
                )
            )
        return self._attributes(inode)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._called("setxattr")
        self._do(Xattr(inode, os.fsdecode(name), value))

    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._called("removexattr")
        if os.fsdecode(name) not in self._node(inode).xattrs:
            raise pyfuse3.FUSEError(errno.ENODATA)
        self._do(Xattr(inode, os.fsdecode(name), None))

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        wanted = os.fsdecode(name)
        if inode == ROOT and wanted.startswith(CONTROL):
            if order := wanted.removeprefix(CONTROL):
                self._told(json.loads(order))
            return json.dumps({"calls": self._calls, "hanging": self._is_hanging}).encode()
        if not wanted.startswith("user."):
            raise pyfuse3.FUSEError(errno.ENODATA)  # the kernel asks for capabilities and ACLs by itself
        await self._called("getxattr")
        if wanted not in self._node(inode).xattrs:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return self._node(inode).xattrs[wanted]

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        await self._called("listxattr")
        return [os.fsencode(name) for name in self._node(inode).xattrs]

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        await self._called("statfs")
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks, data.f_bfree, data.f_bavail = 1 << 20, 1 << 19, 1 << 19
        data.f_files, data.f_ffree, data.f_favail = 1 << 20, 1 << 19, 1 << 19
        data.f_namemax = 255
        return data

    # requests about open files; the handle is the inode

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        await self._called("open")
        return self._opened(inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self._called("read")
        return bytes(self._node(fh).data[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        await self._called("write")
        self._do(Write(fh, off, bytes(buf), time.time_ns()))
        return len(buf)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._called("fsync")
        self._do(Sync(fh, only_data=datasync))

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._called("fsyncdir")
        self._do(Sync(fh, only_data=False))

    async def flush(self, fh: int) -> None:
        await self._called("flush")

    async def release(self, fh: int) -> None:
        return

    async def releasedir(self, fh: int) -> None:
        return

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        return  # nothing is freed: an inode's number is never used again

    # what the handlers share

    async def _called(self, call: str) -> None:
        """Count a call; fail or hang when it is its turn."""
        fault = self._fault
        if not fault:
            return
        self._calls.append(call)
        at = len(self._calls)
        if at < fault["at"] or (at > fault["at"] and not fault.get("lasting")):
            return
        if fault.get("changing") and call not in CHANGING:
            return
        if fault.get("hang"):
            self._is_hanging = True
            await self._hanging.wait()
            raise pyfuse3.FUSEError(errno.EINTR)
        raise pyfuse3.FUSEError(fault["errno"])

    def _told(self, order: dict[str, Any]) -> None:
        match order["do"]:
            case "begin":
                self._base, self._operations = self._disk.copy(), []
            case "mark":
                self._operations.append(Mark(order["text"]))
            case "dump":
                Path(order["path"]).write_bytes(pickle.dumps((self._base, self._operations, self._disk)))
            case "save":
                self._saved[order["name"]] = self._disk.copy()
            case "restore":
                # with numbers of their own: the kernel remembers of an inode that it was removed
                self._disk = self._saved[order["name"]].renumbered(self._next_inode)
                self._next_inode = max(self._disk.nodes) + 1
                self._base, self._operations = self._disk.copy(), []
            case "fault":
                self._calls = []
                self._fault = order["fault"] or {}
                self._hanging.set()
                self._hanging, self._is_hanging = trio.Event(), False

    def _do(self, operation: Operation) -> None:
        self._disk.apply(operation)
        self._operations.append(operation)

    def _make(self, verb: str, parent: int, name: str, mode: int, ctx: pyfuse3.RequestContext) -> int:
        if name in self._node(parent).entries:
            raise pyfuse3.FUSEError(errno.EEXIST)
        inode, self._next_inode = self._next_inode, self._next_inode + 1
        self._do(Names(verb, ((parent, name, inode),), (inode, mode, ctx.uid, ctx.gid)))
        return inode

    def _node(self, inode: int) -> Node:
        node = self._disk.nodes.get(inode)
        if node is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return node

    def _child(self, parent: int, name: str) -> int:
        inode = self._node(parent).entries.get(name)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return inode

    def _opened(self, inode: int) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        node = self._node(inode)
        found = pyfuse3.EntryAttributes()
        found.st_ino, found.st_mode, found.st_uid, found.st_gid = inode, node.mode, node.uid, node.gid
        found.st_nlink = 2 if node.is_directory else 1
        found.st_size, found.st_blksize = len(node.data), 4096
        found.st_blocks = -(-len(node.data) // 512)
        found.st_mtime_ns = found.st_ctime_ns = found.st_atime_ns = node.mtime_ns
        found.entry_timeout = found.attr_timeout = 0
        return found
