"""What a restored file is given beside its content: owner, attributes, access lists, mode and times.

Nothing gives more rights than it did in the guest: where an access list cannot be kept, the group gets what the list
gave it and not the list's mask, which the mode shows in its place. Set-user-id bits and attributes of the system's name
spaces are kept only if asked for; what is left out is counted.
Source: acl(5), "correspondence between ACL entries and file permission bits"; posix_acl_xattr.h.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections import Counter
from dataclasses import dataclass

from clients.files.wire import Entry

ACCESS_LIST = b"system.posix_acl_access"
DEFAULT_LIST = b"system.posix_acl_default"
_SYSTEM = (b"system.", b"trusted.", b"security.")
_SET_ID = stat.S_ISUID | stat.S_ISGID
_VERSION, _GROUP, _MASK = 2, 0x04, 0x10


@dataclass(frozen=True)
class Wishes:
    """What to keep. `privileged` keeps set-user-id bits, device nodes and attributes of the system's name spaces."""

    privileged: bool = False
    owners: bool = True
    verify: bool = False


def dress(
    file: int | str,
    entry: Entry,
    attributes: dict[bytes, bytes | None] | None,
    wishes: Wishes,
    left_out: Counter[str],
) -> list[str]:
    """Give a file, directory or node what it had; return what could not be given, in words.

    Args:  file        a descriptor, or a path that leads to the file whatever happens (beneath.handle)
           attributes  None: they could not be read
           left_out    is told what was left out on purpose
    Raises OSError when owner, mode or times cannot be set.
    """
    problems: list[str] = []
    # owners first: a change of owner takes file capabilities and set-user-id bits away
    if wishes.owners:
        os.chown(file, entry.uid, entry.gid)
    mode = entry.mode
    if mode & _SET_ID and not wishes.privileged:
        mode &= ~_SET_ID
        left_out["set_id_bits"] += 1
    for name, value in (attributes or {}).items():
        if name in (ACCESS_LIST, DEFAULT_LIST):
            continue
        if name.startswith(_SYSTEM) and not wishes.privileged:
            left_out["attributes"] += 1
        elif value is None:
            problems.append(f"attribute {os.fsdecode(name)}: its value cannot be read")
        else:
            problems += _set(file, name, value)
    mode = _give_lists(file, mode, attributes, wishes, left_out, problems)
    os.chmod(file, mode)
    os.utime(file, ns=(entry.atime_ns, entry.mtime_ns))
    return problems


def _give_lists(
    file: int | str,
    mode: int,
    attributes: dict[bytes, bytes | None] | None,
    wishes: Wishes,
    left_out: Counter[str],
    problems: list[str],
) -> int:
    """Give a file its access lists; return the mode it is to have."""
    for name in (ACCESS_LIST, DEFAULT_LIST) if stat.S_ISDIR(mode) else (ACCESS_LIST,):
        unknown = attributes is None
        value = None if attributes is None else attributes.get(name)
        if unknown or (attributes and name in attributes):
            if value is None:
                # that no attribute at all can be read is said by who asked for them
                problems += [] if unknown else [f"attribute {os.fsdecode(name)}: its value cannot be read"]
            elif not wishes.owners:
                left_out["access_lists"] += 1  # it names users by number, as owners do
            elif not (problem := _set(file, name, value)):
                continue
            else:
                problems += problem
            if name == ACCESS_LIST:
                mode = _without_list(mode, value)
        # what the file has instead may be of an earlier restore, or come from its directory's default list
        try:
            os.removexattr(file, name)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
    return stat.S_IMODE(mode)


def _set(file: int | str, name: bytes, value: bytes) -> list[str]:
    try:
        os.setxattr(file, name, value)
    except OSError as error:
        return [f"attribute {os.fsdecode(name)}: {error.strerror}"]
    return []


def _without_list(mode: int, access_list: bytes | None) -> int:
    """Return a mode whose group bits are the group's own; of a list that says nothing, no more than all others have."""
    group = mode & (mode << 3) & stat.S_IRWXG
    content = access_list or b""
    if len(content) >= 4 and len(content) % 8 == 4 and struct.unpack_from("<I", content)[0] == _VERSION:
        entries = {tag: rights for tag, rights, _ in struct.iter_unpack("<HHI", content[4:])}
        if _GROUP in entries:
            group = (entries[_GROUP] & entries.get(_MASK, 7) & 7) << 3
    return mode & ~stat.S_IRWXG | group
