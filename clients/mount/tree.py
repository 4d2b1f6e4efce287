"""What a mount shows, as directories and files that the FUSE side walks: disks/, files/, and of --all every VM.

Everything is made when it is looked at. Nothing here blocks the event loop: what may wait runs in a thread.
"""

from __future__ import annotations

import errno
import stat
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from clients.blocks import Blocks
from clients.files.snapshot import READABLE, FileTree, OpenSnapshot
from clients.files.wire import Entry
from clients.gateway import Gateway
from clients.page_cache import PageCache
from clients.patience import answered, patiently
from frostgate.v1 import group_snapshot_pb2 as pb

FOREVER_S = 3600.0
LOOK_AGAIN_S = 2.0


@dataclass(frozen=True)
class Directory:
    """A directory of ours. `list` may block; what it returns holds for `valid_s` seconds.

    What has another `identity` is another directory, also when it has the name of one that was there before.
    """

    list: Callable[[], Mapping[bytes, Node]]
    time_ns: int
    valid_s: float = FOREVER_S
    identity: object = None


@dataclass(frozen=True)
class Text:
    """A small file of ours."""

    content: bytes
    time_ns: int


@dataclass(frozen=True)
class Disk:
    """A member's bytes."""

    blocks: Blocks
    time_ns: int


@dataclass(frozen=True)
class Inode:
    """Something in a guest's file system; `depth` is how many directories it lies below its tree's root."""

    tree: FileTree
    entry: Entry
    depth: int
    parent: int = 0


Node = Directory | Text | Disk | Inode


def snapshot_directory(opened: OpenSnapshot) -> Directory:
    """Return disks/ and files/ of a snapshot."""
    cut_ns = opened.group.cut_time.ToNanoseconds()
    disks = {f"{name}.raw".encode(): Disk(disk, cut_ns) for name, disk in zip(opened.names, opened.disks, strict=True)}

    def volumes() -> Mapping[bytes, Node]:
        return {
            name.encode(): Directory(_once(partial(_partitions_of, opened, number, cut_ns)), cut_ns)
            for number, name in enumerate(opened.names)
        }

    return Directory(
        lambda: {b"disks": Directory(lambda: disks, cut_ns), b"files": Directory(_once(volumes), cut_ns)}, cut_ns
    )


def _partitions_of(opened: OpenSnapshot, number: int, time_ns: int) -> Mapping[bytes, Node]:
    return _partitions(opened.trees()[number], time_ns)


def _why_not(text: Text) -> Mapping[bytes, Node]:
    return {b"WHY-NOT.txt": text}


def _partitions(trees: list[FileTree], time_ns: int) -> Mapping[bytes, Node]:
    shown: dict[bytes, Node] = {}
    for one in trees:
        name = one.tree.name.replace("/", "_").encode()
        if one.tree.why_not:
            text = Text(one.tree.why_not.encode(), time_ns)
            shown[name] = Directory(partial(_why_not, text), time_ns)
            continue
        try:
            shown[name] = Inode(one, one.parser.root(one.number), 0)
        except OSError as error:
            text = Text(f"Not shown: {error.strerror}.\n".encode(), time_ns)
            shown[name] = Directory(partial(_why_not, text), time_ns)
        if one.note:
            shown[name + b".NOTICE.txt"] = Text(f"{one.note}\n".encode(), time_ns)
    return shown


def _once(make: Callable[[], Mapping[bytes, Node]]) -> Callable[[], Mapping[bytes, Node]]:
    made: list[Mapping[bytes, Node]] = []

    def get() -> Mapping[bytes, Node]:
        if not made:
            made.append(make())
        return made[0]

    return get


@dataclass
class Everything:
    """Every VM with its snapshots, and those of no VM below "no-vm"; looked up when looked at."""

    gateway: Gateway
    passphrase: str | None = None
    _cache: PageCache = field(default_factory=PageCache)
    _open: dict[str, OpenSnapshot] = field(default_factory=dict)
    _vms: dict[str, dict[str, int]] = field(default_factory=dict)
    _looked_at: float = -LOOK_AGAIN_S
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def root(self) -> Directory:
        """Return the directory of VMs."""
        return Directory(self._list_vms, time.time_ns(), LOOK_AGAIN_S)

    def close(self) -> None:
        """Close what was opened."""
        for opened in self._open.values():
            opened.close()

    def _look(self) -> dict[str, dict[str, int]]:
        """Return the readable snapshots of every VM with their times, asked for again after LOOK_AGAIN_S."""
        with self._lock:
            if time.monotonic() < self._looked_at + LOOK_AGAIN_S:
                return self._vms
            found = patiently(lambda: answered(lambda: list(self.gateway.list())))
            vms: dict[str, dict[str, int]] = {}
            for snapshot in found:
                if snapshot.state in READABLE:
                    vm = (snapshot.vm.name or snapshot.vm.uuid or "no-vm").replace("/", "%2F")
                    vms.setdefault(vm, {})[snapshot.id] = snapshot.cut_time.ToNanoseconds()
            there = {snapshot.id: _identity(snapshot) for snapshot in found}
            for snapshot_id, opened in list(self._open.items()):
                if there.get(snapshot_id) != _identity(opened.group):
                    self._open.pop(snapshot_id).close()
            self._vms, self._looked_at = vms, time.monotonic()
            return vms

    def _list_vms(self) -> Mapping[bytes, Node]:
        now_ns = time.time_ns()
        return {vm.encode(): Directory(partial(self._snapshots, vm), now_ns, LOOK_AGAIN_S) for vm in self._look()}

    def _snapshots(self, vm: str) -> Mapping[bytes, Node]:
        return {
            # another one may have its id later
            name.encode(): Directory(partial(self._snapshot, name, cut_ns), cut_ns, LOOK_AGAIN_S, identity=cut_ns)
            for name, cut_ns in self._look().get(vm, {}).items()
        }

    def _snapshot(self, snapshot_id: str, identity: int) -> Mapping[bytes, Node]:
        with self._lock:
            if snapshot_id not in self._open:
                opening = partial(OpenSnapshot, self.gateway, snapshot_id, self.passphrase, self._cache)
                self._open[snapshot_id] = patiently(partial(answered, opening), snapshot_id)
            opened = self._open[snapshot_id]
            if _identity(opened.group) != identity:
                raise OSError(errno.ESTALE, "was deleted; another snapshot has its id now", snapshot_id)
            return snapshot_directory(opened).list()


def _identity(snapshot: pb.GroupSnapshot) -> int:
    """Return what tells a snapshot from one that had its id before."""
    return snapshot.cut_time.ToNanoseconds()


def child(of: Inode, entry: Entry) -> Inode:
    """Return an entry of a directory."""
    return replace(of, entry=entry, depth=of.depth + 1, parent=of.entry.id)


def confined(target: bytes, depth: int) -> bytes:
    """Return a symbolic link's target so that it stays within a tree; the link lies `depth - 1` below its root.

    Absolute targets begin at the tree's root. ".." never leads above it; in the middle of a target, where what goes
    before could be a link itself, it is resolved by name.
    """
    up = depth - 1
    climbs = 0 if not target.startswith(b"/") else up
    rest: list[bytes] = []
    changed = target.startswith(b"/")
    for part in target.split(b"/"):
        if part in (b"", b"."):
            continue
        if part != b"..":
            rest.append(part)
        elif rest:
            rest.pop()
            changed = True
        elif climbs < up:
            climbs += 1
        else:
            changed = True
    return b"/".join([b".."] * climbs + rest) or b"." if changed else target


def is_file(entry: Entry) -> bool:
    """Tell whether an entry has content of its own."""
    return stat.S_ISREG(entry.mode)


def is_directory(node: Node) -> bool:
    """Tell whether a node has entries."""
    return isinstance(node, Directory) or (isinstance(node, Inode) and stat.S_ISDIR(node.entry.mode))
