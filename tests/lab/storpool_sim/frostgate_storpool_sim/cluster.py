"""One cluster: its records and its bytes, and what keeps them together.

Two locks. `lock` is held by every call for as long as it works: calls happen one after the other. `bytes_lock` is held
by every read and write of a device, and by a call only for the instant in which volumes change their layers: so a
snapshot of several volumes falls between two writes, for all of them at once.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from frostgate_storpool_sim.catalog import (
    Attachment,
    Bucket,
    Catalog,
    Counters,
    Disk,
    Item,
    LayerRecord,
    PlacementGroup,
    Record,
    Template,
    first_records,
)
from frostgate_storpool_sim.errors import Refused, busy, exists, missing
from frostgate_storpool_sim.layers import Layer, LayerStore

R = TypeVar("R", bound=Record)
_KINDS: tuple[type[Record], ...] = (
    Item,
    Attachment,
    Template,
    PlacementGroup,
    Disk,
    Bucket,
    LayerRecord,
    Counters,
)
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Settings:
    """What a cluster is made with. `cluster_id` is "location.subcluster"; `client` is this host's id.

    `deletion_s` is how long a deleted snapshot is listed as such; `known` has names and ids of other clusters.
    """

    name: str
    cluster_id: str
    clients: tuple[int, ...]
    client: int
    template: str
    capacity_bytes: int
    deletion_s: float = 0.0
    known: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Device:
    """What this host's client has; `name` is the volume's or snapshot's as the API tells it."""

    global_id: str
    name: str
    size_bytes: int
    writable: bool
    snapshot: bool


class Host(Protocol):
    """The machine on which the cluster's own client runs: devices.Devices."""

    def show(self, cluster_id: str, devices: Sequence[Device]) -> None:
        """Let exactly these devices of a cluster be there. Repeatable. Raises OSError."""

    def is_open(self, global_id: str) -> bool:
        """Whether a program has a device open."""


class Cluster:
    """Volumes, snapshots and what else there is. Callers hold `lock` unless a method says otherwise."""

    def __init__(self, directory: Path, settings: Settings, host: Host) -> None:
        """Open what the directory has, or make an empty cluster there."""
        directory.mkdir(exist_ok=True)
        self.settings = settings
        self.host = host
        self._family: tuple[dict[str, Item], dict[str, Item]] | None = None
        self.lock = threading.RLock()
        self.bytes_lock = threading.Lock()
        self.started = int(time.time())
        self._catalog = Catalog(directory / "catalog.db")
        self._tables: dict[type[Record], dict[str, Record]] = {kind: dict(self._catalog.load(kind)) for kind in _KINDS}
        counters = self.table(Counters).get("", Counters())
        self.generation, self._number = counters.generation, counters.number
        self.layers = LayerStore(directory / "layers")
        for record in _parents_first(self.table(LayerRecord)):
            parent = self.layers.open.get(record.parent)
            self.layers.add(record.name, parent, record.size_bytes, record.shown)
        self.layers.forget_strangers()
        if not self.table(Disk):
            self.commit(first_records(settings.template))

    def table(self, kind: type[R]) -> dict[str, R]:
        """Return the records of a class, by key; not to be changed but by commit()."""
        return self._tables[kind]  # type: ignore[return-value]

    @property
    def items(self) -> dict[str, Item]:
        """Volumes and snapshots by global id."""
        return self.table(Item)

    def commit(self, kept: Sequence[Record], removed: Sequence[Record] = ()) -> None:
        """Make a change: all of it is there afterwards, also after kill -9, or nothing."""
        counters = Counters(self.generation + 1, self._number)
        self._catalog.save([*kept, counters], removed)
        self.generation += 1
        for record in removed:
            self._tables[type(record)].pop(record.key, None)
        for record in kept:
            self._tables[type(record)][record.key] = record
        self._family = None

    def next_number(self) -> int:
        """Return a number that nothing here had before."""
        self._number += 1
        return self._number

    def global_id(self, number: int) -> str:
        """Return the global id of the thing with a number."""
        return f"{self.settings.cluster_id}.{_base36(number)}"

    # finding

    def volume(self, name: str) -> Item:
        """Return a volume by name or ~global id. Raises Refused(objectDoesNotExist)."""
        return self._found(name, snapshot=False)

    def snapshot(self, name: str) -> Item:
        """Return a snapshot that is not being deleted, by name or ~global id. Raises Refused(objectDoesNotExist)."""
        return self._found(name, snapshot=True)

    def require_free(self, name: str) -> None:
        """Volumes and snapshots share one space of names. Raises Refused(objectExists)."""
        if name:
            for item in self.items.values():
                if item.name == name and not item.deleted:
                    raise exists("Snapshot" if item.snapshot else "Volume", name)

    def attachments(self, item: Item) -> list[Attachment]:
        """Return who has a volume or snapshot, by client."""
        found = [held for held in self.table(Attachment).values() if held.global_id == item.global_id]
        return sorted(found, key=lambda held: held.client)

    def require_detached(self, item: Item) -> None:
        """Raises Refused(busy), naming the clients."""
        clients = ", ".join(str(held.client) for held in self.attachments(item))
        if clients:
            kind = "Snapshot" if item.snapshot else "Volume"
            raise busy(f"{kind} '{item.shown_name}' is attached to client {clients}.")

    def parent(self, item: Item) -> Item | None:
        """Return the nearest snapshot below a volume or snapshot."""
        return self._relatives()[0].get(item.global_id)

    def child_volume(self, item: Item) -> Item | None:
        """Return a volume whose parent a snapshot is."""
        return self._relatives()[1].get(item.global_id)

    def show_devices(self) -> None:
        """Let this host have the devices that its client has attached."""
        held = [held for held in self.table(Attachment).values() if held.client == self.settings.client]
        devices = []
        for attachment in held:
            item = self.items[attachment.global_id]
            writable = attachment.rights == "rw"
            devices.append(Device(item.global_id, item.shown_name, item.size_bytes, writable, item.snapshot))
        self.host.show(self.settings.cluster_id, devices)

    # bytes

    def layer(self, item: Item) -> Layer:
        """Return the topmost layer of a volume or snapshot."""
        return self.layers.open[item.layer]

    @contextmanager
    def making(self) -> Iterator[Callable[[Layer | None, int], Layer]]:
        """Give a function that makes layers upon others; all are taken back when something goes wrong."""
        made: list[Layer] = []

        def make(parent: Layer | None, size_bytes: int) -> Layer:
            made.append(self.layers.add(f"{self.next_number():08d}", parent, size_bytes))
            return made[-1]

        try:
            yield make
        except BaseException:
            for layer in reversed(made):
                self.layers.remove(layer)
            raise

    def free_bytes(self) -> int:
        """How much may still be written."""
        return max(0, self.settings.capacity_bytes - self.layers.used_bytes())

    def read(self, global_id: str, offset: int, length: int) -> bytes:
        """Read as a client does. Needs no lock. Raises OSError."""
        with self.bytes_lock:
            item = self._device(global_id)
            return self.layer(item).read(offset, max(0, min(length, item.size_bytes - offset)))

    def write(self, global_id: str, offset: int, content: bytes) -> int:
        """Write as a client does; returns how much. Needs no lock. Raises OSError."""
        with self.bytes_lock:
            item = self._device(global_id)
            if item.snapshot:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            content = content[: max(0, item.size_bytes - offset)]
            layer = self.layer(item)
            if not content or layer.new_chunks(offset, len(content)) * 4096 > self.free_bytes():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            layer.write(offset, content)
            return len(content)

    def sync(self, global_id: str) -> None:
        """Return when what was written before is on the disk below. Needs no lock; others may write meanwhile."""
        with self.bytes_lock:
            unsynced = self.layer(self._device(global_id)).unsynced()
        for file in unsynced:
            file.sync()

    def close(self) -> None:
        """Close the files."""
        with self.lock, self.bytes_lock:
            self.layers.close()
            self._catalog.close()

    def _found(self, name: str, *, snapshot: bool) -> Item:
        kind = "Snapshot" if snapshot else "Volume"
        if name.startswith("~"):
            item = self.items.get(name[1:])
        else:
            item = next((item for item in self.items.values() if item.name == name), None)
        if item is None or item.snapshot is not snapshot or item.deleted:
            raise missing(kind, name)
        return item

    def _relatives(self) -> tuple[dict[str, Item], dict[str, Item]]:
        """Parents by the children's global ids; volumes by their parents'."""
        if self._family is None:
            owners = {item.layer: item for item in self.items.values() if item.snapshot}
            parents, volumes = {}, {}
            for item in self.items.values():
                layer = self.layer(item).parent
                while layer is not None and layer.name not in owners:
                    layer = layer.parent
                if layer is not None:
                    parent = parents[item.global_id] = owners[layer.name]
                    if not item.snapshot:
                        volumes[parent.global_id] = item
            self._family = parents, volumes
        return self._family

    def _device(self, global_id: str) -> Item:
        item = self.items.get(global_id)
        if item is None:
            raise OSError(errno.EIO, f"{global_id} is gone")
        return item


def record_of(layer: Layer) -> LayerRecord:
    """Return a layer's record."""
    return LayerRecord(layer.name, layer.parent.name if layer.parent else "", layer.size_bytes, layer.shown)


def with_layer(item: Item, layer: Layer) -> Item:
    """Return a volume's record with another layer, and its size."""
    return replace(item, layer=layer.name, size_bytes=layer.size_bytes)


def require_all_different(names: Sequence[str]) -> None:
    """Raises Refused(invalidParam)."""
    for name, times in Counter(names).items():
        if times > 1:
            raise Refused("invalidParam", f"'{name}' is named {times} times.")


def _parents_first(records: dict[str, LayerRecord]) -> Iterator[LayerRecord]:
    known = {""}
    waiting = list(records.values())
    while waiting:
        ready = [record for record in waiting if record.parent in known]
        if not ready:
            raise ValueError(f"layers upon layers that are missing: {[record.name for record in waiting]}")
        yield from ready
        known.update(record.name for record in ready)
        waiting = [record for record in waiting if record.name not in known]


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return digits or "0"
