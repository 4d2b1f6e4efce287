"""The record of a group snapshot: what the gateway wants kept with it, up to 4 MiB, and what a revert has begun.

StorPool keeps tags of 199 characters with an object, so the record has a small volume of its own. The volume's
existence and tags say that the group is settled and when it was cut; its bytes are two slots, written in turn: what
was there before is whole until the next is durable, so that a record is replaced as one. It is attached to this host
for as long as it is read or written. Deleting the volume is the first step of deleting the group.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from providers.base import PoolFull, PoolUnavailable, SnapshotNotFound
from providers.storpool import tags
from providers.storpool.cluster import Cluster, Exists, Missing
from providers.storpool.devices import Devices
from providers.storpool.objects import Found, Objects

_MIB = 1 << 20
_SLOT_BYTES = 8 * _MIB
_HEADER_BYTES = 4096
_MOST_BYTES = _SLOT_BYTES - _HEADER_BYTES
_STATES = (tags.NEW, tags.SETTLED)
_MAGIC = "frostgate-record-1"


class Detached(BaseModel):
    """One attachment that a revert undid, and will make again: of a volume (its global id), on a client."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    volume_id: str
    client: int
    rights: str


class _Header(BaseModel):
    """Begins a slot. `sequence` says which slot is the newer."""

    model_config = ConfigDict(extra="ignore")

    magic: str
    sequence: int
    stored_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Content:
    """What a record volume has: the gateway's record, and what a revert under way has detached."""

    record: bytes
    detached: tuple[Detached, ...] = ()


class Store:
    """The records of one pool."""

    def __init__(self, cluster: Cluster, objects: Objects, devices: Devices) -> None:
        """Take the cluster and the way to its devices."""
        self._cluster = cluster
        self._objects = objects
        self._devices = devices

    def find(self, group: str) -> Found | None:
        """Return the volume of a group's record, finished or not, or None."""
        try:
            return self._objects.any_volume(tags.record_name(self._objects.scope, group))
        except Missing:
            return None

    def settled(self, group: str) -> Found:
        """Return the volume of a finished group's record. Raises SnapshotNotFound."""
        found = self.find(group)
        if found is None or not is_settled(found):
            raise SnapshotNotFound(f"the storage has no snapshot {group}", group=group)
        return found

    def finish(self, group: str, cut: str, cut_time: datetime, record: bytes) -> None:
        """Make a group settled, with its record; repeatable. Raises PoolFull, PoolUnavailable."""
        marks = {state: tags.of_record(self._objects.scope, group, cut, cut_time, state) for state in _STATES}
        found = self.find(group)
        if found is None:
            name = tags.record_name(self._objects.scope, group)
            with suppress(Exists):  # a repeat whose first answer was lost
                self._objects.created(name, marks[tags.NEW], size=2 * _SLOT_BYTES)
            found = self._objects.any_volume(name)
        self.write(found, Content(record))
        if not is_settled(found):
            self._cluster.call("volumeUpdate", found.by_id, {"tags": marks[tags.SETTLED]})

    def read(self, found: Found) -> Content:
        """Return what a record volume has. Raises SnapshotNotFound when neither slot can be read."""
        with self._devices.attached(found) as path, _opened(path, os.O_RDONLY) as descriptor:
            return _latest(descriptor, found)[1]

    def write(self, found: Found, content: Content) -> None:
        """Replace what a record volume has, as one; durable when it returns. Raises PoolFull, PoolUnavailable."""
        with self._devices.attached(found) as path, _opened(path, os.O_RDWR) as descriptor:
            try:
                sequence = _latest(descriptor, found)[0].sequence
            except SnapshotNotFound:  # a new one
                sequence = 0
            _write_slot(descriptor, sequence + 1, content)

    def describe(self, found: Found, record: bytes) -> None:
        """Replace the record and keep the rest. Raises SnapshotNotFound, PoolFull, PoolUnavailable."""
        self.write(found, Content(record, self.read(found).detached))

    def remove(self, found: Found) -> None:
        """Delete a record volume; fine when it is gone. Raises PoolUnavailable."""
        self._devices.sweep([found])
        with suppress(Missing):
            self._cluster.call("volumeDelete", found.by_id)


def is_settled(found: Found) -> bool:
    """Tell whether a record volume is that of a finished group."""
    return found.tags.get(tags.STATE) == tags.SETTLED


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Yield a device's descriptor; what the kernel says becomes PoolFull or PoolUnavailable."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PoolFull(f"{path} cannot be written: {error.strerror}; make room") from error
        raise PoolUnavailable(f"{path} cannot be read or written: {error.strerror}") from error


def _latest(descriptor: int, found: Found) -> tuple[_Header, Content]:
    """Return the newest slot that is whole. Raises SnapshotNotFound when there is none."""
    slots = [slot for place in (0, 1) if (slot := _read_slot(descriptor, place))]
    if not slots:
        raise SnapshotNotFound(
            f"the record of {found.tags.get(tags.GROUP)} in {found.name} cannot be read",
            group=found.tags.get(tags.GROUP, ""),
        )
    return max(slots, key=lambda slot: slot[0].sequence)


def _read_slot(descriptor: int, place: int) -> tuple[_Header, Content] | None:
    begin = place * _SLOT_BYTES
    try:
        header = _Header.model_validate_json(os.pread(descriptor, _HEADER_BYTES, begin).rstrip(b"\0"))
    except ValidationError:
        return None
    stored = os.pread(descriptor, min(header.stored_bytes, _MOST_BYTES), begin + _HEADER_BYTES)
    if header.magic != _MAGIC or hashlib.sha256(stored).hexdigest() != header.sha256:
        return None
    detached, _, record = zlib.decompressobj().decompress(stored, 2 * _MOST_BYTES).partition(b"\n")
    return header, Content(record, tuple(Detached.model_validate(one) for one in json.loads(detached)))


def _write_slot(descriptor: int, sequence: int, content: Content) -> None:
    """Write the slot that the one before does not lie in: first the bytes, then, once they are durable, the header."""
    begin = (sequence % 2) * _SLOT_BYTES
    detached = json.dumps([one.model_dump() for one in content.detached]).encode()
    stored = zlib.compress(detached + b"\n" + content.record)
    if len(stored) > _MOST_BYTES:
        raise PoolFull(f"a record of {len(stored)} bytes is more than the {_MOST_BYTES} there is room for")
    header = _Header(
        magic=_MAGIC, sequence=sequence, stored_bytes=len(stored), sha256=hashlib.sha256(stored).hexdigest()
    )
    _pwrite(descriptor, bytes(_HEADER_BYTES), begin)
    _pwrite(descriptor, stored, begin + _HEADER_BYTES)
    os.fsync(descriptor)
    _pwrite(descriptor, header.model_dump_json().encode().ljust(_HEADER_BYTES, b"\0"), begin)
    os.fsync(descriptor)


def _pwrite(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
