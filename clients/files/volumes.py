"""What lies on the disks of a snapshot: partitions, logical volumes, file systems, and what cannot be read and why.

Runs in the confined process. Structures are read by the libyal libraries; of ours are only the magic numbers of what
we cannot read, to say by name what it is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clients.files import lvm, wire
from clients.files.dos import DosTree
from clients.files.ext_attributes import ExtAttributes
from clients.files.ext_inodes import ExtInodes
from clients.files.posix import PosixTree
from clients.files.ranges import Bytes, FileObject, LibraryBytes, Part
from clients.files.sleuthkit_names import SleuthkitNames, sleuthkit_image
from clients.files.xfs_attributes import XfsAttributes
from clients.files.xfs_inodes import XfsInodes
from clients.files.xfs_names import XfsNames

AnyTree = PosixTree | DosTree

_EXT_INCOMPATIBLE = 1024 + 0x60
_EXT_NEEDS_RECOVERY = 0x4
_LUKS_VERSION = 6
_LUKS2 = (
    "it is encrypted with LUKS2, which no library that we can use reads (LUKS1 is read). On a loop device of the disk: "
    "`cryptsetup open --readonly /dev/loopNpM NAME`, then `mount -o ro /dev/mapper/NAME DIR`"
)
_RAW_HINT = (
    "Use the disk itself: `losetup --read-only --partscan --find --show disks/<volume>.raw` (raw bytes, whatever the "
    "image's format) and the tools of a host that you trust with it"
)
_UNREADABLE: tuple[tuple[int, bytes, str, str], ...] = (
    (65536 + 64, b"_BHRfS_M", "btrfs", "no maintained library reads Btrfs without mounting it"),
    (4096, b"\xfc\x4e\x2b\xa9", "md-raid", "software RAID is not assembled here; see mdadm --assemble --readonly"),
    (0, b"\xfc\x4e\x2b\xa9", "md-raid", "software RAID is not assembled here; see mdadm --assemble --readonly"),
    (4086, b"SWAPSPACE2", "swap", "swap space has no files"),
    (4086, b"SWAP-SPACE", "swap", "swap space has no files"),
)
# looked for first: libfsfat takes exFAT for FAT
_UNREADABLE_BOOT_SECTORS: tuple[tuple[int, bytes, str, str], ...] = (
    (3, b"EXFAT   ", "exfat", "exFAT is not read here"),
    (3, b"-FVE-FS-", "bitlocker", "BitLocker volumes are not unlocked here; see dislocker"),
)


@dataclass(frozen=True)
class Found:
    """A partition or logical volume: what is said of it, and its file system when it has one that we read."""

    tree: wire.Tree
    open: Callable[[], AnyTree] | None


@dataclass(frozen=True)
class _Space:
    """A disk, a partition or a logical volume that may hold something."""

    disks: tuple[int, ...]
    name: str
    source: Bytes


def scan(disks: Sequence[Bytes], passphrase: str | None = None) -> list[Found]:
    """Return everything on the disks, in their order. What is damaged is said, never raised."""
    spaces = [space for number, disk in enumerate(disks) for space in _partitions(number, disk)]
    physical = [space for space in spaces if lvm.is_physical_volume(space.source)]
    unlocked = [_unlock(space, passphrase) for space in spaces if space not in physical]
    found = [one if isinstance(one, Found) else _file_system(one) for one in unlocked]
    inner = [space for space in unlocked if isinstance(space, _Space) and lvm.is_physical_volume(space.source)]
    found = [
        one for one in found if all(one.tree.name != space.name or one.tree.disks != space.disks for space in inner)
    ]
    return found + list(_logical(physical + inner))


def _partitions(number: int, disk: Bytes) -> Iterator[_Space]:
    import pyvsgpt

    whole = _Space((number,), "whole", disk)
    try:
        if _signed("pyvsgpt", disk):
            volume = pyvsgpt.volume()
            volume.open_file_object(FileObject(disk))
            for part in volume.partitions:
                yield _Space((number,), f"p{part.entry_index + 1}", Part(disk, part.volume_offset, part.size))
            return
        if not any(_signed(name, disk) for name in ("pyfsext", "pyfsxfs", "pyfsntfs")):
            found = list(_mbr(disk))
            if found:
                yield from (_Space((number,), f"p{slot}", part) for slot, part in found)
                return
    except OSError as error:
        whole = _Space((number,), "whole", Part(disk, 0, 0))
        yield _Space((number,), f"damaged-partition-table: {_brief(error)}", whole.source)
        return
    yield whole


def _mbr(disk: Bytes) -> Iterator[tuple[int, Part]]:
    """Yield the partitions of an MBR, numbered as Linux does: primary 1..4 by their slot, logical from 5 on."""
    import pytsk3

    # FAT's boot sector ends alike; the Sleuth Kit tells them apart
    if disk.pread(510, 2) != b"\x55\xaa":
        return
    try:
        table = pytsk3.Volume_Info(sleuthkit_image(disk), pytsk3.TSK_VS_TYPE_DOS)
    except OSError:
        return
    logical = 4
    for part in table:
        if int(part.flags) != int(pytsk3.TSK_VS_PART_FLAG_ALLOC):
            continue
        if part.table_num > 0:
            logical += 1
        slot = logical if part.table_num > 0 else part.slot_num + 1
        yield slot, Part(disk, part.start * table.info.block_size, part.len * table.info.block_size)


def _logical(physical: Sequence[_Space]) -> Iterator[Found]:
    """Yield the logical volumes of every volume group whose physical volumes are all here."""
    groups: dict[str, list[tuple[_Space, lvm.PhysicalVolume]]] = {}
    for space in physical:
        try:
            volume = lvm.open_physical_volume(space.source)
            groups.setdefault(str(volume.group.get("id", volume.group_name)), []).append((space, volume))
        except (lvm.Unreadable, OSError) as error:
            yield _refused(space, "lvm", f"its LVM metadata cannot be read ({error})")
    for members in groups.values():
        disks = tuple(sorted({disk for space, _ in members for disk in space.disks}))
        name = members[0][1].group_name
        whole = _Space(disks, name, members[0][0].source)
        volumes = [volume for _, volume in members]
        absent = lvm.missing(volumes)
        if absent:
            yield _refused(whole, "lvm", f"{absent} physical volumes of volume group {name} are not in this snapshot")
            continue
        try:
            for one in lvm.logical_volumes(volumes):
                space = _Space(disks, f"{name}-{one.name}", one.source or whole.source)
                yield _file_system(space) if one.source else _refused(space, "lvm", one.why_not)
        except lvm.Unreadable as error:
            yield _refused(whole, "lvm", str(error))


def _unlock(space: _Space, passphrase: str | None) -> _Space | Found:
    if not _signed("pyluksde", space.source):
        return space
    import pyluksde

    if space.source.pread(_LUKS_VERSION, 2) == b"\0\2":
        return _refused(space, "luks", _LUKS2)
    if passphrase is None:
        return _refused(space, "luks", "it is encrypted (LUKS): say --key-file FILE with its passphrase")
    try:
        volume = pyluksde.volume()
        volume.set_password(passphrase)
        volume.open_file_object(FileObject(space.source))
        if volume.is_locked() and not volume.unlock():
            return _refused(space, "luks", "the passphrase does not open it")
        return _Space(space.disks, space.name, LibraryBytes(volume))
    except OSError as error:
        return _refused(space, "luks", f"it cannot be unlocked here ({_brief(error)}); see cryptsetup open --readonly")


def _file_system(space: _Space) -> Found:
    if space.name.startswith("damaged"):
        name, _, why = space.name.partition(": ")
        return _refused(_Space(space.disks, name, space.source), "unknown", f"it cannot be read ({why})")
    for offset, magic, kind, why in _UNREADABLE_BOOT_SECTORS:
        if space.source.pread(offset, len(magic)) == magic:
            return _refused(space, kind, why)
    for kind, library, make in _KINDS:
        if not _signed(library, space.source):
            continue
        open_it = _opener(make, library, space.source)
        try:
            opened = open_it()
            note = _note(kind, space.source)
        except OSError as error:
            return _refused(
                space, kind, f"its {kind} file system is damaged or of a version not known ({_brief(error)})"
            )
        return Found(wire.Tree(space.disks, space.name, kind, opened.label, note), open_it)
    for offset, magic, kind, why in _UNREADABLE:
        if space.source.pread(offset, len(magic)) == magic:
            return _refused(space, kind, why)
    return _refused(space, "unknown", "nothing that we know begins here")


def _opener(make: Callable[[Any, Bytes], AnyTree], library: str, source: Bytes) -> Callable[[], AnyTree]:
    return lambda: make(__import__(library), source)


def _ext(library: Any, source: Bytes) -> PosixTree:
    attributes = ExtAttributes(source)
    return PosixTree(library, source, SleuthkitNames(source, "EXT"), attributes, ExtInodes(source, attributes))


def _xfs(library: Any, source: Bytes) -> PosixTree:
    inodes = XfsInodes(source)
    return PosixTree(library, source, XfsNames(source, inodes), XfsAttributes(source), inodes)


_KINDS: tuple[tuple[str, str, Callable[[Any, Bytes], AnyTree]], ...] = (
    ("ext", "pyfsext", _ext),
    ("xfs", "pyfsxfs", _xfs),
    ("ntfs", "pyfsntfs", lambda library, source: DosTree(library, source, SleuthkitNames(source, "NTFS"))),
    ("fat", "pyfsfat", DosTree),
)


def _note(kind: str, source: Bytes) -> str:
    """Say what the journal means for who reads."""
    if kind == "ext":
        (incompatible,) = struct.unpack("<I", source.pread(_EXT_INCOMPATIBLE, 4).ljust(4, b"\0"))
        if incompatible & _EXT_NEEDS_RECOVERY:
            return (
                "The journal was not replayed: the guest was writing when the snapshot was cut. The newest changes to "
                "files may be missing or half done here; the kernel, mounting a copy, would replay them."
            )
    if kind == "xfs":
        return (
            "The journal is not looked at: unless the snapshot is consistent for file systems, the newest changes to "
            "files may be missing or half done here; the kernel, mounting a copy, would replay them."
        )
    return ""


def _refused(space: _Space, kind: str, why: str) -> Found:
    return Found(wire.Tree(space.disks, space.name, kind, why_not=f"Not shown: {why}.\n{_RAW_HINT}.\n"), None)


def _signed(library: str, source: Bytes) -> bool:
    try:
        return bool(__import__(library).check_volume_signature_file_object(FileObject(source)))
    except OSError:
        return False


def _brief(error: OSError) -> str:
    return str(error).split(". ")[0].strip()[:200]
