"""What Frostgate keeps in an rbd pool and namespace beside the images: one object a group snapshot, and their list.

The object has the members, where their snapshots are, and the record that the journal is rebuilt from. It is
written as a whole, so it is always one state or the next:

reserved  prepare() went before: whatever there is of the group's snapshots is unfinished
settled   the group snapshot exists
deleting  it does not any more, however much of it is left

The list is written before the first object and shortened after the last, so that nothing is ever forgotten.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import Any, Literal

import rados
from pydantic import BaseModel, ConfigDict, ValidationError

from providers.base import SnapshotNotFound
from providers.ceph.cluster import read_omap_keys, remove_omap, write_omap

_LIST = "frostgate.groups"
_PREFIX = "frostgate.group."
_MOST_BYTES = 16 * 1024 * 1024

RBD_GROUP_PREFIX = "frostgate."
"""The RBD group of group snapshot x is frostgate.x, and so is the snapshot of a member that is in no RBD group."""


class StoredMember(BaseModel):
    """One image's snapshot. `snap_id` is 0 until it is settled; `kind` is how it is cut."""

    model_config = ConfigDict(extra="ignore")

    volume: str
    image_id: str
    size_bytes: int
    kind: Literal["group", "snapshot"]
    snap_id: int = 0


class Manifest(BaseModel):
    """All of a group snapshot in this pool. `rbd_group_id` is Ceph's own id of the RBD group, or "" without one."""

    model_config = ConfigDict(extra="ignore")

    version: Literal[1] = 1
    group: str
    state: Literal["reserved", "settled", "deleting"]
    rbd_group_id: str = ""
    cut_time: datetime | None = None
    members: list[StoredMember]
    record: str = ""

    @property
    def rbd_name(self) -> str:
        """Name of the RBD group, and of the snapshots outside it."""
        return RBD_GROUP_PREFIX + self.group

    def member(self, volume: str) -> StoredMember:
        """Return one member or raise SnapshotNotFound."""
        for member in self.members:
            if member.volume == volume:
                return member
        raise SnapshotNotFound(
            f"the storage has no snapshot of {volume} in {self.group}", group=self.group, volume=volume
        )

    def in_group(self) -> list[StoredMember]:
        """Return the members that one RBD group snapshot cuts."""
        return [member for member in self.members if member.kind == "group"]

    def alone(self) -> list[StoredMember]:
        """Return the members that have a snapshot each."""
        return [member for member in self.members if member.kind == "snapshot"]


def groups(context: Any) -> list[str]:
    """Return the ids of all groups that anything may be left of."""
    return read_omap_keys(context, _LIST)


def read(context: Any, group: str) -> Manifest | None:
    """Return a group's manifest in whatever state, or None. Raises SnapshotNotFound when it cannot be read."""
    try:
        content = context.read(_PREFIX + group, _MOST_BYTES)
    except rados.ObjectNotFound:
        return None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise SnapshotNotFound(f"the manifest of {group} cannot be read: {error}", group=group) from error


def settled(context: Any, group: str) -> Manifest:
    """Return the manifest of a finished group snapshot or raise SnapshotNotFound."""
    found = read(context, group)
    if found is None or found.state != "settled":
        raise SnapshotNotFound(f"the storage has no snapshot {group}", group=group)
    return found


def reserve(context: Any, manifest: Manifest) -> None:
    """Write a new group's manifest, after it is listed."""
    write_omap(context, _LIST, [(manifest.group, b"")])
    write(context, manifest)


def write(context: Any, manifest: Manifest) -> None:
    """Replace a manifest as a whole. Durable when it returns."""
    context.write_full(_PREFIX + manifest.group, manifest.model_dump_json().encode())


def remove(context: Any, group: str) -> None:
    """Forget a group of which nothing is left. Repeatable."""
    with suppress(rados.ObjectNotFound):  # a repeat
        context.remove_object(_PREFIX + group)
    remove_omap(context, _LIST, group)
