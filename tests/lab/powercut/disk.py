"""What is on the disk: inodes, and the operations that change them one at a time.

An operation is atomic, as it is in a file system with a journal: a rename between two directories is there as a whole
or not at all. Nothing else is assumed: operations that were not synced reach the disk in any order or never.
"""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

ROOT = 1


@dataclass
class Node:
    """One inode. Directories have entries, files have data."""

    mode: int
    uid: int = 0
    gid: int = 0
    data: bytearray = field(default_factory=bytearray)
    entries: dict[str, int] = field(default_factory=dict)
    xattrs: dict[str, bytes] = field(default_factory=dict)
    mtime_ns: int = 0

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def copy(self) -> "Node":
        return Node(
            self.mode,
            self.uid,
            self.gid,
            bytearray(self.data),
            dict(self.entries),
            dict(self.xattrs),
            self.mtime_ns,
        )


@dataclass(frozen=True)
class Names:
    """Directory entries set or removed at once: (directory, name, inode or None). `makes` is a new inode's node."""

    verb: str
    changes: tuple[tuple[int, str, int | None], ...]
    makes: tuple[int, int, int, int] | None = None
    """(inode, mode, uid, gid)"""


@dataclass(frozen=True)
class Write:
    """Bytes of a file."""

    inode: int
    offset: int
    data: bytes
    mtime_ns: int


@dataclass(frozen=True)
class Truncate:
    """The size of a file."""

    inode: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Attributes:
    """Owner and mode of an inode, as far as they are given."""

    inode: int
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True)
class Xattr:
    """One extended attribute; None removes it."""

    inode: int
    name: str
    value: bytes | None


@dataclass(frozen=True)
class Sync:
    """fsync, or fdatasync when only data is made durable, of a file or a directory."""

    inode: int
    only_data: bool


@dataclass(frozen=True)
class Mark:
    """A word of the test in between."""

    text: str


Operation = Names | Write | Truncate | Attributes | Xattr | Sync | Mark


class Disk:
    """All inodes."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {ROOT: Node(stat.S_IFDIR | 0o755)}

    def copy(self) -> "Disk":
        copied = Disk()
        copied.nodes = {inode: node.copy() for inode, node in self.nodes.items()}
        return copied

    def renumbered(self, first: int) -> "Disk":
        """Return a copy whose inodes, but for the root, have other numbers, from `first` on."""
        numbers = {ROOT: ROOT, **{inode: first + inode for inode in self.nodes if inode != ROOT}}
        copied = Disk()
        copied.nodes = {numbers[inode]: node.copy() for inode, node in self.nodes.items()}
        for node in copied.nodes.values():
            node.entries = {name: numbers[inode] for name, inode in node.entries.items()}
        return copied

    def apply(self, operation: Operation) -> None:
        """Do it; what lies in an inode that was never made is lost with it."""
        match operation:
            case Names(changes=changes, makes=makes):
                if makes is not None:
                    inode, mode, uid, gid = makes
                    self.nodes.setdefault(inode, Node(mode, uid, gid))
                for directory, name, target in changes:
                    entries = self.nodes.setdefault(directory, Node(stat.S_IFDIR | 0o700)).entries
                    if target is None:
                        entries.pop(name, None)
                    else:
                        self.nodes.setdefault(target, Node(stat.S_IFREG | 0o600))
                        entries[name] = target
            case Write(inode=inode, offset=offset, data=data, mtime_ns=mtime_ns):
                node = self._file(inode)
                node.data.extend(bytes(max(0, offset + len(data) - len(node.data))))
                node.data[offset : offset + len(data)] = data
                node.mtime_ns = mtime_ns
            case Truncate(inode=inode, size=size, mtime_ns=mtime_ns):
                node = self._file(inode)
                del node.data[size:]
                node.data.extend(bytes(size - len(node.data)))
                node.mtime_ns = mtime_ns
            case Attributes(inode=inode, mode=mode, uid=uid, gid=gid, mtime_ns=mtime_ns):
                node = self._file(inode)
                node.mode = node.mode if mode is None else stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
                node.uid = node.uid if uid is None else uid
                node.gid = node.gid if gid is None else gid
                node.mtime_ns = node.mtime_ns if mtime_ns is None else mtime_ns
            case Xattr(inode=inode, name=name, value=value):
                node = self._file(inode)
                if value is None:
                    node.xattrs.pop(name, None)
                else:
                    node.xattrs[name] = value

    def _file(self, inode: int) -> Node:
        return self.nodes.setdefault(inode, Node(stat.S_IFREG | 0o600))

    def at(self, path: str) -> Node | None:
        """Return what is under a path from the root."""
        node = self.nodes[ROOT]
        for part in path.split("/"):
            if part not in node.entries:
                return None
            node = self.nodes[node.entries[part]]
        return node

    def digest(self) -> object:
        """What tells two states apart: all that can be reached, no inode numbers."""
        return self._seen(ROOT)

    def _seen(self, inode: int) -> object:
        node = self.nodes[inode]
        inside = tuple((name, self._seen(child)) for name, child in sorted(node.entries.items()))
        attributes = node.mode, node.uid, node.gid, node.mtime_ns, tuple(sorted(node.xattrs.items()))
        return attributes, bytes(node.data), inside

    def write_to(self, directory: Path) -> None:
        """Make the state in a directory of a real file system."""
        made: dict[int, Path] = {}
        self._write_inside(ROOT, directory, made)

    def _write_inside(self, inode: int, directory: Path, made: dict[int, Path]) -> None:
        for name, child in self.nodes[inode].entries.items():
            node, path = self.nodes[child], directory / name
            if child in made:  # the two names of a rename of which one directory was written
                os.link(made[child], path)
                continue
            made[child] = path
            if node.is_directory:
                path.mkdir()
                self._write_inside(child, path, made)
            else:
                path.write_bytes(node.data)
            for key, value in node.xattrs.items():
                os.setxattr(path, key, value)
            os.chown(path, node.uid, node.gid)
            path.chmod(stat.S_IMODE(node.mode))
            os.utime(path, ns=(node.mtime_ns, node.mtime_ns))
