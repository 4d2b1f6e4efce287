"""What stat(2) tells of a node of the mount."""

from __future__ import annotations

import os
import stat

import pyfuse3

from clients.mount.asking import in_thread
from clients.mount.tree import FOREVER_S, Directory, Inode, Node, Text

_BLOCK_BYTES = 512


async def attributes_of(number: int, node: Node, *, exact: bool = True) -> pyfuse3.EntryAttributes:
    """Return the attributes of a node that has an inode number.

    Unless `exact`, a disk's allocation is not looked up, and the kernel asks again. Raises FUSEError.
    """
    answer = pyfuse3.EntryAttributes()
    answer.st_ino = number
    answer.attr_timeout = answer.entry_timeout = FOREVER_S
    answer.st_blksize = 65536
    if isinstance(node, Inode):
        entry = node.entry
        answer.st_mode, answer.st_nlink = entry.mode, entry.links
        answer.st_uid, answer.st_gid = entry.uid, entry.gid
        answer.st_size = max(0, entry.size_bytes)
        answer.st_blocks = -(-entry.allocated_bytes // _BLOCK_BYTES)
        answer.st_rdev = os.makedev(*entry.device)
        answer.st_mtime_ns, answer.st_atime_ns, answer.st_ctime_ns = entry.mtime_ns, entry.atime_ns, entry.ctime_ns
        return answer
    # what is ours belongs to who mounted, who reads it with the rights that he has at the gateway
    answer.st_uid, answer.st_gid = os.geteuid(), os.getegid()
    answer.st_atime_ns = answer.st_mtime_ns = answer.st_ctime_ns = node.time_ns
    answer.st_nlink = 1
    answer.st_mode = stat.S_IFREG | 0o444
    if isinstance(node, Directory):
        answer.st_mode = stat.S_IFDIR | 0o555
        answer.st_nlink = 2
        answer.attr_timeout = answer.entry_timeout = node.valid_s
    elif isinstance(node, Text):
        answer.st_size = len(node.content)
        answer.st_blocks = -(-len(node.content) // _BLOCK_BYTES)
    else:
        disk = node.blocks
        answer.st_mode = stat.S_IFREG | 0o400
        answer.st_size = disk.size_bytes
        allocated = await in_thread(disk.allocated_bytes) if exact else disk.size_bytes
        answer.st_blocks = -(-allocated // _BLOCK_BYTES)
        if not exact:
            answer.attr_timeout = 0
    return answer
