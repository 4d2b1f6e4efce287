"""The plain data that verbs take and return. Import it from providers.base."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a pool can do; the fields are those of frostgate.v1.PoolCapabilities."""

    atomic_group: bool = False
    instant_cut: bool = False
    revert: bool = False
    instant_revert: bool = False
    online_revert: bool = False
    clone: bool = False
    read_blocks: bool = False
    allocated_extents: bool = False
    changed_extents: bool = False
    max_members: int = 128


@dataclass(frozen=True, slots=True)
class Space:
    """Room on the storage, in bytes."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Volume:
    """One virtual disk. `size_bytes` is what the guest sees; `users` says in words who writes to it."""

    name: str
    size_bytes: int
    allocated_bytes: int
    format: str
    in_use: bool = False
    users: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DiskSource:
    """Where a disk lies as libvirt says it; exactly one of the three is set.

    `rbd` is "pool/image" or "pool/namespace/image".
    """

    file: str | None = None
    rbd: str | None = None
    block_device: str | None = None
    monitors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Attachment:
    """The running VM that a caller says has a volume attached: to be checked, never believed.

    `hypervisor` is the host's name as libvirt gives it, `domain` the UUID, `disk` the target ("vda").
    """

    hypervisor: str
    domain: str
    disk: str


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """One volume to snapshot; `format` is None when the caller did not say."""

    name: str
    format: str | None = None
    attachment: Attachment | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """One volume's snapshot. `handle` is the storage's own name for it, empty before the cut.

    `mode` says in a word how it is cut ("clone", "backup", "copy"); `local_path` is its image file on this host, or "".
    `atomic` members of a group are cut by one operation of the storage.
    """

    volume: str
    size_bytes: int
    format: str
    mode: str
    handle: str = ""
    local_path: str = ""
    atomic: bool = False


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What prepare() is asked for: this pool's share of a group snapshot."""

    group: str
    volumes: tuple[VolumeSpec, ...]
    allow_copy: bool = False


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A group snapshot that the storage itself says exists.

    `record` is what describe() left with it (empty when it never came to that).
    """

    group: str
    cut_time: datetime | None
    members: tuple[Member, ...]
    record: bytes = b""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of bytes that is not a hole."""

    offset: int
    length: int
