"""What there is in a cluster: plain records, kept in SQLite, a transaction for every change.

SQLite does not sync (`synchronous = OFF`): what was committed survives kill -9, but not a power cut.
"""

from __future__ import annotations

import json
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R", bound="Record")


@dataclass(frozen=True)
class Record(ABC):
    """Anything that is kept under a key."""

    @property
    @abstractmethod
    def key(self) -> str:
        """What no two records of a class share."""


@dataclass(frozen=True)
class LayerRecord(Record):
    """A layer's place among the others; see layers.Layer."""

    name: str
    parent: str
    size_bytes: int
    shown: int

    @property
    def key(self) -> str:
        """The name."""
        return self.name


@dataclass(frozen=True)
class Policy:
    """What templates, volumes and snapshots have in common. "" or None: not said."""

    template: str = ""
    replication: int | None = None
    place_all: str = ""
    place_tail: str = ""
    place_head: str = ""
    bw: Any = "-"
    iops: Any = "-"
    limit_type: str | None = None
    reuse_server: bool | None = None


@dataclass(frozen=True)
class Item(Record):
    """A volume or a snapshot. `name` is "" when it has none; times are Unix timestamps."""

    global_id: str
    number: int
    name: str
    layer: str
    size_bytes: int
    created: int
    snapshot: bool
    policy: Policy = field(default_factory=Policy)
    tags: dict[str, str] = field(default_factory=dict)
    origin: str = ""
    origin_number: int = 0
    automatic_name: bool = False
    bound: bool = False
    delete_at: int = 0
    deleted_at: float | None = None

    @property
    def key(self) -> str:
        """The global id."""
        return self.global_id

    @property
    def deleted(self) -> bool:
        """Whether it is a snapshot that goes as soon as it can."""
        return self.deleted_at is not None

    @property
    def shown_name(self) -> str:
        """The name as the API tells it."""
        return self.name or f"~{self.global_id}"


@dataclass(frozen=True)
class Attachment(Record):
    """A client has a volume or snapshot; `position` is the client's number for it."""

    global_id: str
    client: int
    rights: str
    position: int

    @property
    def key(self) -> str:
        """The global id and the client."""
        return f"{self.global_id} {self.client}"


@dataclass(frozen=True)
class Template(Record):
    """A volume template; `parent` is a snapshot's name or ""."""

    name: str
    number: int
    policy: Policy
    size_bytes: int = 0
    parent: str = ""

    @property
    def key(self) -> str:
        """The name."""
        return self.name


@dataclass(frozen=True)
class PlacementGroup(Record):
    """Disks under a name."""

    name: str
    number: int
    disks: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """The name."""
        return self.name


@dataclass(frozen=True)
class Disk(Record):
    """A disk of a server, and what was asked of it; times are Unix timestamps, 0 for not."""

    number: int
    server: int
    ssd: bool
    description: str = ""
    soft_eject: str = "off"
    scrubbing_since: int = 0
    paused_at: int = 0

    @property
    def key(self) -> str:
        """The number."""
        return str(self.number)


@dataclass(frozen=True)
class Bucket(Record):
    """A bucket of the key-value store."""

    name: str
    version: int = 0
    pairs: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name."""
        return self.name


@dataclass(frozen=True)
class Counters(Record):
    """`generation` counts the changes of the configuration; `number` is the last id that was given."""

    generation: int = 1
    number: int = 0

    @property
    def key(self) -> str:
        """There is one."""
        return ""


SERVERS = (1, 2, 3)


def first_records(template: str) -> list[Record]:
    """Return what a new cluster has: disks, placement groups for both kinds and all of them, a template."""
    disks = [Disk(server * 100 + kind, server, ssd=kind == 2) for server in SERVERS for kind in (1, 2)]
    members = {
        "default": disks,
        "hdd": [disk for disk in disks if not disk.ssd],
        "ssd": [disk for disk in disks if disk.ssd],
    }
    groups = [
        PlacementGroup(name, number, tuple(disk.number for disk in found))
        for number, (name, found) in enumerate(members.items(), start=1)
    ]
    policy = Policy(template, replication=3, place_all="hdd", place_tail="ssd", place_head="hdd")
    return [*disks, *groups, Template(template, 1, policy)]


class Catalog:
    """The records of one cluster. One thread at a time."""

    def __init__(self, file: Path) -> None:
        """Open the file, or make it."""
        self._database = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS records (kind TEXT, key TEXT, body TEXT, PRIMARY KEY (kind, key)) WITHOUT ROWID"
        )

    def load(self, kind: type[R]) -> dict[str, R]:
        """Return every record of a class, by key."""
        rows = self._database.execute("SELECT key, body FROM records WHERE kind = ? ORDER BY key", (kind.__name__,))
        return {key: _decoded(kind, json.loads(body)) for key, body in rows}

    def save(self, kept: Iterable[Record], removed: Iterable[Record] = ()) -> None:
        """Write and remove records, all or none. Raises sqlite3.Error."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            for record in removed:
                self._database.execute("DELETE FROM records WHERE kind = ? AND key = ?", _address(record))
            for record in kept:
                body = json.dumps(asdict(record))
                self._database.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", (*_address(record), body))
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _address(record: Record) -> tuple[str, str]:
    return type(record).__name__, record.key


def _decoded(kind: type[R], body: dict[str, Any]) -> R:
    if "policy" in body:
        body["policy"] = Policy(**body["policy"])
    return kind(**body)
