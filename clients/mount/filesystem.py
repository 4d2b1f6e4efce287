"""The FUSE file system: pyfuse3's requests answered from clients.mount.tree.

Snapshots do not change, so that the kernel may keep what it was told. Storage and parsers are waited for in
threads; reads of a local file that the page cache has are answered at once.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from itertools import islice
from typing import Any, TypeVar

import pyfuse3
import structlog

from clients.blocks import Blocks
from clients.files.parser import attributes, found_entry, target
from clients.files.wire import Entry
from clients.mount.asking import ask, in_thread, told
from clients.mount.attributes import attributes_of
from clients.mount.contents import Contents, is_small
from clients.mount.inodes import Inodes
from clients.mount.listings import Listings
from clients.mount.tree import Directory, Disk, Inode, Node, Text, child, confined, is_directory
from clients.mount.waiting import waiting
from clients.patience import Away

H = TypeVar("H", bound=Callable[..., Awaitable[Any]])
_STORED_NOTED = 100_000
_log = structlog.get_logger()


def _answering(handler: H) -> H:
    """Have a request that meets a fault of ours fail with EIO and a line in the log: the others go on."""

    @wraps(handler)
    async def answer(self: SnapshotFilesystem, *arguments: Any) -> Any:
        try:
            return await handler(self, *arguments)
        except pyfuse3.FUSEError:
            raise
        except Exception:  # the request's edge; what leaves it ends the mount
            _log.exception("fault", request=handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return answer  # type: ignore[return-value]


@dataclass
class _OpenDirectory:
    """A directory being read. `batch` is what the parser told of it last, from position `begin` on.

    The kernel has room for a part of that at a time, in older ones for a page of it.
    """

    inode: int
    names: list[bytes] = field(default_factory=list)
    entries: Mapping[bytes, Node] = field(default_factory=dict)
    begin: int = 0
    batch: list[tuple[bytes, Entry | None]] = field(default_factory=list)
    complete_at: int = -1


class SnapshotFilesystem(pyfuse3.Operations):
    """A read-only file system below one Directory."""

    def __init__(self, root: Directory) -> None:
        """Take the root."""
        super().__init__()
        self._inodes = Inodes(root, ask)
        self._opens: Counter[int] = Counter()
        self._stored: OrderedDict[int, None] = OrderedDict()
        self._directories: dict[int, _OpenDirectory] = {}
        self._next_handle = 1
        self._listings = Listings(ask)
        self._contents = Contents(ask)
        self.ahead = self._contents.ahead
        """To be run beside the requests: reads files that are likely to be opened."""
        self._attributed: tuple[int, dict[bytes, bytes | None]] = (0, {})

    @_answering
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        """Find a name in a directory."""
        if name == b".":
            return await self.getattr(parent_inode)
        node = await self._inodes.node(parent_inode)
        if isinstance(node, Inode):
            tree = node.tree
            found = await ask(tree, found_entry, "find", node.entry.id, name)
            there: Node | None = None if found is None else child(node, found)
        else:
            there = (await self._entries(parent_inode)).get(name)
        if there is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        number = self._inodes.number(parent_inode, name, there)
        self._inodes.told(number)
        return await attributes_of(number, there)

    @_answering
    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        """Tell an inode's attributes."""
        return await attributes_of(inode, await self._inodes.node(inode))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Let go of what the kernel does not hold any more."""
        for inode, count in inode_list:
            self._inodes.forget(inode, count)
            self._stored.pop(inode, None)

    @_answering
    async def opendir(self, inode: int, ctx: Any) -> int:
        """Begin reading a directory."""
        if not is_directory(await self._inodes.node(inode)):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        handle = self._next_handle
        self._next_handle += 1
        self._directories[handle] = _OpenDirectory(inode)
        return handle

    @_answering
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Tell entries from a position on, with their attributes."""
        reading = self._directories[fh]
        node = await self._inodes.node(reading.inode)
        position = start_id
        if isinstance(node, Inode):
            tree = node.tree
            if reading.complete_at == position:
                return
            if not reading.begin <= position < reading.begin + len(reading.batch):
                reading.batch, complete = await self._listings.part(tree, node.entry.id, position)
                reading.begin = position
                self._contents.listed(tree, node.entry.id, (found for _, found in reading.batch), begin=position == 0)
                if complete:
                    reading.complete_at = position + len(reading.batch)
            for name, found in islice(reading.batch, position - reading.begin, None):
                position += 1
                if found is None:
                    _log.warning("entry_damaged", name=os.fsdecode(name))
                    continue
                with suppress(pyfuse3.FUSEError):  # in the log; who looks at it by its name is told
                    if not await self._reply(token, reading.inode, name, child(node, found), position):
                        return
            return
        if start_id == 0:
            reading.entries = await self._entries(reading.inode)
            reading.names = sorted(reading.entries)
        for name in reading.names[start_id:]:
            position += 1
            if not await self._reply(token, reading.inode, name, reading.entries[name], position):
                return

    async def _reply(self, token: pyfuse3.ReaddirToken, parent: int, name: bytes, node: Node, position: int) -> bool:
        number = self._inodes.number(parent, name, node)
        if not pyfuse3.readdir_reply(token, name, await attributes_of(number, node, exact=False), position):
            self._inodes.forget(number)
            return False
        self._inodes.told(number)
        return True

    async def releasedir(self, fh: int) -> None:
        """End reading a directory."""
        self._directories.pop(fh, None)

    @_answering
    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        """Open for reading."""
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise pyfuse3.FUSEError(errno.EROFS)
        node = await self._inodes.node(inode)
        self._opens[inode] += 1
        if isinstance(node, Inode) and is_small(node.entry) and inode not in self._stored and self._opens[inode] == 1:
            try:
                content = await self._contents.whole(node)
            except BaseException:
                self._closed(inode)
                raise
            # only for the one who opens it: storing waits for reads under way, which wait for us
            if self._opens[inode] == 1 and len(content) == node.entry.size_bytes and _store(inode, content):
                self._stored[inode] = None
                if len(self._stored) > _STORED_NOTED:
                    self._stored.popitem(last=False)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def release(self, fh: int) -> None:
        """Close."""
        self._closed(fh)

    def _closed(self, inode: int) -> None:
        self._opens[inode] -= 1
        if self._opens[inode] <= 0:
            del self._opens[inode]

    @_answering
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read."""
        node = await self._inodes.node(fh)
        if isinstance(node, Text):
            return node.content[off : off + size]
        if isinstance(node, Disk):
            return await _read_disk(node.blocks, off, size)
        if isinstance(node, Inode):
            return await self._contents.part(node, off, size)
        raise pyfuse3.FUSEError(errno.EISDIR)

    @_answering
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        """Tell where a link points, within its tree."""
        node = await self._inodes.node(inode)
        if not isinstance(node, Inode):
            raise pyfuse3.FUSEError(errno.EINVAL)
        return confined(await ask(node.tree, target, "link", node.entry.id), node.depth)

    @_answering
    async def listxattr(self, inode: int, ctx: Any) -> list[bytes]:
        """Tell the names of the extended attributes."""
        return list(await self._xattrs(inode))

    @_answering
    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        """Tell one extended attribute. Those by which the kernel would give rights are told, and nosuid voids them."""
        found = await self._xattrs(inode)
        if name not in found:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        value = found[name]
        if value is None:
            raise pyfuse3.FUSEError(errno.EIO)
        return value

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        """Tell the sizes of the disks."""
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_namemax = 255
        return answer

    async def _xattrs(self, inode: int) -> dict[bytes, bytes | None]:
        node = await self._inodes.node(inode)
        if not isinstance(node, Inode) or not node.entry.attributed:
            return {}
        # `ls -l` asks for one name after the other
        last, found = self._attributed
        if last != inode:
            found = await ask(node.tree, attributes, "xattrs", node.entry.id)
            self._attributed = inode, found
        return found

    async def _entries(self, inode: int) -> Mapping[bytes, Node]:
        known = self._inodes.kept(inode)
        node = known.node
        if not isinstance(node, Directory):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        if known.entries is None or time.monotonic() > known.read_at + node.valid_s:
            known.entries = await in_thread(node.list)
            known.read_at = time.monotonic()
        return known.entries


def _store(inode: int, content: bytes) -> bool:
    """Put a file's content into the kernel's page cache; tell whether it took it."""
    try:
        pyfuse3.notify_store(inode, 0, content)
    except OSError as error:
        _log.info("not_stored", error=str(error))  # it is read in the usual way then
        return False
    return True


async def _read_disk(disk: Blocks, offset: int, length: int) -> bytes:
    """Read a disk, without a thread where that can be. Raises FUSEError."""
    content = disk.at_once(offset, length)
    if content is None and disk.fetches:
        # in the event loop, on purpose: a local disk has it before a thread would
        await waiting.let_others()
        content = told(lambda: disk.read(offset, length))
    if content is not None:
        return content
    asked = disk.begin(offset, length)
    if asked:
        try:
            await waiting.for_answer(asked)
            return asked.finish()
        except Away:
            pass  # read() is patient
        finally:
            asked.abandon()
    return await in_thread(lambda: disk.read(offset, length))
