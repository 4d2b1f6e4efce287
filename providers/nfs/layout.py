"""Where snapshots lie beside the volumes, and the manifest that makes them snapshots.

    <root>/.frostgate/<group>/<volume>          a member
    <root>/.frostgate/<group>/.manifest.json    written last, atomically: no manifest, no snapshot
    <root>/.frostgate/<group>/.cut.json         what was cut, from the cut to the manifest
    <root>/.frostgate/<group>/.backing/<n>      a file that members have below their own
    <root>/.frostgate/<group>/.revert/<volume>  staged, before it is renamed over the volume

A volume's name never begins with a dot, so nothing of these can be one.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from providers.base import SnapshotNotFound
from providers.nfs.beneath import directory, open_beneath

SNAPSHOTS = ".frostgate"
MANIFEST = ".manifest.json"
CUT = ".cut.json"
BACKING = ".backing"
REVERT = ".revert"
_MAX_BYTES = 16 * 1024 * 1024


class Attributes(BaseModel):
    """Owner, mode and extended attributes of a volume."""

    uid: int
    gid: int
    mode: int
    xattrs: dict[str, str] = {}

    @staticmethod
    def of(descriptor: int) -> Attributes:
        """Read them. What the file system does not keep is left out."""
        status = os.fstat(descriptor)
        xattrs = {}
        with suppress(OSError):
            for name in os.listxattr(descriptor):
                if name.startswith("user."):
                    xattrs[name] = os.getxattr(descriptor, name).hex()
        return Attributes(uid=status.st_uid, gid=status.st_gid, mode=stat.S_IMODE(status.st_mode), xattrs=xattrs)

    def put_on(self, descriptor: int) -> None:
        """Set them. Raises OSError."""
        os.fchown(descriptor, self.uid, self.gid)
        os.fchmod(descriptor, self.mode)
        for name, value in self.xattrs.items():
            os.setxattr(descriptor, name, bytes.fromhex(value))


class StoredBacking(BaseModel):
    """A file below a member's own, kept in the group's directory as BACKING/<kept>; it never changes.

    `path` is where the volume's header expects it, beneath the root; "" when only the snapshot needs it.
    `file_bytes` and `mtime_ns` tell whether it is what it was.
    """

    kept: str
    format: str
    path: str = ""
    file_bytes: int
    mtime_ns: int


class StoredMember(BaseModel):
    """One member as the manifest has it. `mtime_ns` is the volume's at the cut.

    `format` is the volume's; `image_format` that of the member's own file where it is another. `backing` is what
    lies below that file, from the top down: the member's bytes are those of the whole chain.
    """

    volume: str
    size_bytes: int
    format: str
    mode: str
    attributes: Attributes
    file_bytes: int = 0
    mtime_ns: int = 0
    image_format: str = ""
    backing: list[StoredBacking] = []

    @property
    def stored_format(self) -> str:
        """The format of the member's own file."""
        return self.image_format or self.format


class Cut(BaseModel):
    """What was cut, before it is durable."""

    members: list[StoredMember]


class Manifest(BaseModel):
    """A settled group snapshot. `record` is the gateway's, as text."""

    version: int = 1
    group: str
    cut_time: datetime
    members: list[StoredMember]
    record: str = ""

    def member(self, volume: str) -> StoredMember:
        """Return one member or raise SnapshotNotFound."""
        for member in self.members:
            if member.volume == volume:
                return member
        raise SnapshotNotFound(f"snapshot {self.group} has no member {volume}", group=self.group, volume=volume)


def group_path(group: str) -> str:
    """Return a group's directory, relative to the root."""
    return f"{SNAPSHOTS}/{group}"


@contextmanager
def group_directory(root_fd: int, group: str) -> Iterator[int | None]:
    """Yield a descriptor of a group's directory, or None when there is none."""
    try:
        descriptor = open_beneath(root_fd, group_path(group), os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def make_directory(within: int, name: str) -> None:
    """Make a directory that only root can enter; one that exists is fine."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=within)


def manifest(root_fd: int, group: str) -> Manifest:
    """Return a group's manifest. Raises SnapshotNotFound when there is none or it cannot be read."""
    with group_directory(root_fd, group) as group_fd:
        found = None if group_fd is None else read(group_fd, MANIFEST)
    if found is None:
        raise SnapshotNotFound(f"the storage has no snapshot {group}", group=group)
    try:
        return Manifest.model_validate(found)
    except ValidationError as error:
        raise SnapshotNotFound(f"the manifest of snapshot {group} is damaged: {error}", group=group) from None


def read(directory_fd: int, name: str) -> Any:
    """Return a JSON file's content, None when it is missing or no JSON."""
    try:
        descriptor = open_beneath(directory_fd, name, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        try:
            return json.loads(file.read(_MAX_BYTES))
        except ValueError:
            return None


def write(directory_fd: int, name: str, content: BaseModel, *, durable: bool = True) -> None:
    """Write a JSON file atomically: temporary file, fsync, rename, fsync of the directory."""
    temporary = f"{name}.new"
    descriptor = open_beneath(directory_fd, temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content.model_dump_json().encode())
        file.flush()
        if durable:
            os.fsync(descriptor)
    os.rename(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    if durable:
        os.fsync(directory_fd)


def remove(directory_fd: int, name: str) -> None:
    """Remove a file; a missing one is fine."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory_fd)


def remove_tree(within: int, name: str) -> None:
    """Remove a directory with all that is in it; a missing one is fine."""
    try:
        with directory(name, within) as tree:
            for entry in list(os.scandir(tree)):
                if entry.is_dir(follow_symlinks=False):
                    remove_tree(tree, entry.name)
                else:
                    remove(tree, entry.name)
    except FileNotFoundError:
        return
    with suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=within)


def remove_group(root_fd: int, group: str) -> None:
    """Remove a group's directory, its manifest first; and the snapshots' directory when it was the last."""
    with group_directory(root_fd, group) as group_fd:
        if group_fd is None:
            return
        remove(group_fd, MANIFEST)
        os.fsync(group_fd)
    remove_tree(root_fd, group_path(group))
    try:
        os.rmdir(SNAPSHOTS, dir_fd=root_fd)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
    os.fsync(root_fd)


def groups(root: Path) -> list[str]:
    """Return the names of all groups' directories, finished or not."""
    try:
        return sorted(entry.name for entry in os.scandir(root / SNAPSHOTS) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []
