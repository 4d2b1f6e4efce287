"""Where snapshots lie beside the volumes, and the manifest that makes them snapshots.

    <root>/.frostgate/.lock                     what gateways lock (locks.py); stays
    <root>/.frostgate/<group>/<volume>          a member
    <root>/.frostgate/<group>/.manifest.json    written last, atomically: no manifest, no snapshot
    <root>/.frostgate/<group>/.cut.json         what was cut, from the cut to the manifest
    <root>/.frostgate/<group>/.backup.json      what hypervisors fill, from prepare to the manifest
    <root>/.frostgate/<group>/.backing/<n>      a file that members have below their own
    <root>/.frostgate/<group>/.revert/<volume>  staged, before it is renamed over the volume

A volume's name never begins with a dot, so nothing of these can be one. What is read here is not trusted: names are
names of volumes, numbers are in their ranges, files are regular and of a bounded size, or it is Damaged.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, Field, ValidationError, model_validator

from providers.base import LimitExceeded, SnapshotNotFound
from providers.nfs.beneath import directory, is_volume_name, open_beneath, open_file

SNAPSHOTS = ".frostgate"
MANIFEST = ".manifest.json"
CUT = ".cut.json"
BACKUP = ".backup.json"
BACKING = ".backing"
REVERT = ".revert"
_MAX_BYTES = 32 * 1024 * 1024
_NO_XATTRS = (errno.EOPNOTSUPP, errno.ENOSYS)


class Damaged(Exception):
    """A file in `.frostgate` is not what was written there."""


def _volume_name(name: str) -> str:
    if not is_volume_name(name):
        raise ValueError("is not a volume's name")
    return name


def _user_xattr(name: str) -> str:
    if not name.startswith("user."):
        raise ValueError("is not a user's attribute")
    return name


def _hexadecimal(value: str) -> str:
    bytes.fromhex(value)
    return value


VolumeName = Annotated[str, AfterValidator(_volume_name)]
Bytes = Annotated[int, Field(ge=0, lt=1 << 63)]
Id = Annotated[int, Field(ge=0, lt=1 << 32)]


class Attributes(BaseModel):
    """Owner, mode and extended attributes of a volume."""

    uid: Id
    gid: Id
    mode: Annotated[int, Field(ge=0, le=0o7777)]
    xattrs: dict[Annotated[str, AfterValidator(_user_xattr)], Annotated[str, AfterValidator(_hexadecimal)]] = {}

    @staticmethod
    def of(descriptor: int) -> Attributes:
        """Read them; a file system without extended attributes has none. Raises OSError."""
        status = os.fstat(descriptor)
        xattrs = {}
        try:
            names = os.listxattr(descriptor)
        except OSError as error:
            if error.errno not in _NO_XATTRS:
                raise
            names = []
        for name in names:
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

    kept: VolumeName
    format: str
    path: str = ""
    file_bytes: Bytes
    mtime_ns: int


class StoredBackup(BaseModel):
    """How a running VM's hypervisor cuts a volume. `file` is the member as the hypervisor sees it.

    `job` names the job, `checkpoint` what is made with it ("" when nothing tracks the volume), `base` the checkpoint
    since which it copies what changed, "" when it copies everything.
    """

    hypervisor: str
    domain: str
    disk: str
    file: str
    job: str
    checkpoint: str = ""
    base: str = ""
    changed_bytes: int = 0


class StoredMember(BaseModel):
    """One member as the manifest has it. `mtime_ns` is the volume's at the cut.

    `format` is the volume's; `image_format` that of the member's own file where it is another. `backing` is what
    lies below that file, from the top down: the member's bytes are those of the whole chain. `backup` is there when
    a hypervisor cut it; `atomic` when that was one operation with the group's others.
    """

    volume: VolumeName
    size_bytes: Bytes
    format: str
    mode: str
    attributes: Attributes
    file_bytes: Bytes = 0
    mtime_ns: int = 0
    image_format: str = ""
    backing: list[StoredBacking] = []
    backup: StoredBackup | None = None
    atomic: bool = False

    @property
    def stored_format(self) -> str:
        """The format of the member's own file."""
        return self.image_format or self.format


class Cut(BaseModel):
    """What was cut, before the manifest.

    `boot` is the boot of this host that it cannot outlive, because not all of it is on the disk; "" when it is.
    """

    members: Annotated[list[StoredMember], Field(min_length=1)]
    boot: str = ""


class Manifest(BaseModel):
    """A settled group snapshot. `record` is the gateway's, as text."""

    version: int = 1
    group: str
    cut_time: AwareDatetime
    members: Annotated[list[StoredMember], Field(min_length=1)]
    record: str = ""

    @model_validator(mode="after")
    def _names_differ(self) -> Manifest:
        if len({member.volume for member in self.members}) < len(self.members):
            raise ValueError("a volume is there twice")
        return self

    def member(self, volume: str) -> StoredMember:
        """Return one member or raise SnapshotNotFound."""
        for member in self.members:
            if member.volume == volume:
                return member
        raise SnapshotNotFound(f"snapshot {self.group} has no member {volume}", group=self.group, volume=volume)


Content = TypeVar("Content", bound=BaseModel)


def group_path(group: str) -> str:
    """Return a group's directory, relative to the root."""
    return f"{SNAPSHOTS}/{group}"


@contextmanager
def group_directory(root_fd: int, group: str) -> Iterator[int | None]:
    """Yield a descriptor of a group's directory, or None when there is none."""
    try:
        descriptor = open_beneath(root_fd, group_path(group), os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
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
    """Return a group's manifest. Raises SnapshotNotFound when there is none or it is not one of that group."""
    damaged = f"the manifest of snapshot {group} is damaged"
    with group_directory(root_fd, group) as group_fd:
        try:
            found = None if group_fd is None else read(group_fd, MANIFEST, Manifest)
        except Damaged as error:
            raise SnapshotNotFound(f"{damaged}: {error}", group=group) from None
    if found is None:
        raise SnapshotNotFound(f"the storage has no snapshot {group}", group=group)
    if found.group != group:
        raise SnapshotNotFound(f"{damaged}: it is of {found.group[:128]!r}", group=group)
    return found


def is_there(root_fd: int, group: str) -> bool:
    """Tell whether there is something under a group's name, be it a directory or not."""
    try:
        os.stat(group_path(group), dir_fd=root_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def is_finished(root_fd: int, group: str) -> bool:
    """Tell whether a group has a manifest, readable or not: then nothing of it is removed but by delete()."""
    with group_directory(root_fd, group) as group_fd:
        if group_fd is None:
            return False
        try:
            os.stat(MANIFEST, dir_fd=group_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
    return True


def read(directory_fd: int, name: str, content: type[Content]) -> Content | None:
    """Return a JSON file's content, None when it is missing. Raises Damaged, OSError."""
    try:
        descriptor = open_file(directory_fd, name)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise Damaged(f"{name} is not a regular file") from None
        raise
    with os.fdopen(descriptor, "rb") as file:
        found = file.read(_MAX_BYTES + 1)
    if len(found) > _MAX_BYTES:
        raise Damaged(f"{name} has more than {_MAX_BYTES} bytes")
    try:
        return content.model_validate_json(found)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise Damaged(f"{'.'.join(map(str, first['loc'])) or name}: {first['msg']}") from None


def write(directory_fd: int, name: str, content: BaseModel, *, durable: bool = True) -> None:
    """Write a JSON file atomically: temporary file, fsync, rename, fsync of the directory.

    Raises LimitExceeded when it is more than read() takes, OSError; then the file is what it was.
    """
    written = content.model_dump_json().encode()
    if len(written) > _MAX_BYTES:
        raise LimitExceeded(
            f"{name} would have more than {_MAX_BYTES} bytes", limit="manifest", maximum=str(_MAX_BYTES)
        )
    temporary = f"{name}.new"
    remove(directory_fd, temporary)
    try:
        descriptor = open_beneath(directory_fd, temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(written)
            file.flush()
            if durable:
                os.fsync(descriptor)
        os.rename(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    except BaseException:
        remove(directory_fd, temporary)
        raise
    if durable:
        os.fsync(directory_fd)


def remove(directory_fd: int, name: str) -> None:
    """Remove a file; a missing one is fine."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory_fd)


def remove_tree(within: int, name: str) -> None:
    """Remove a directory with all that is in it, or what else has its name; a missing one is fine."""
    tree = _open_tree(within, name)
    if tree is None:
        return
    try:
        for entry in list(os.scandir(tree)):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(tree, entry.name)
            else:
                remove(tree, entry.name)
    finally:
        os.close(tree)
    with suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=within)


def remove_group(root_fd: int, group: str) -> None:
    """Remove a group's directory, durably; its manifest first, so that what a crash leaves of it is no snapshot."""
    try:
        snapshots = open_beneath(root_fd, SNAPSHOTS, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        tree = _open_tree(snapshots, group)
        if tree is not None:
            try:
                try:
                    remove(tree, MANIFEST)
                except IsADirectoryError:  # planted
                    remove_tree(tree, MANIFEST)
                os.fsync(tree)
            finally:
                os.close(tree)
            remove_tree(snapshots, group)
        os.fsync(snapshots)
    finally:
        os.close(snapshots)


def sync_snapshots(root_fd: int) -> None:
    """Make durable which groups there are; fine when there are none."""
    with suppress(FileNotFoundError), directory(SNAPSHOTS, root_fd) as snapshots_fd:
        os.fsync(snapshots_fd)


def _open_tree(within: int, name: str) -> int | None:
    """Return a directory's descriptor, None when there is none; what else has its name, planted, is removed."""
    try:
        return open_beneath(within, name, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
    remove(within, name)
    return None


def groups(root_fd: int) -> list[str]:
    """Return the names of all groups' directories, finished or not."""
    try:
        with directory(SNAPSHOTS, root_fd) as snapshots:
            return sorted(
                entry.name
                for entry in os.scandir(snapshots)
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            )
    except FileNotFoundError:
        return []


def boot() -> str:
    """Return what names this boot of this host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
