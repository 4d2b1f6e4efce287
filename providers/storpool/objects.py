"""What a cluster has: volumes, snapshots and attachments, as far as Frostgate looks at them.

Lists of a whole cluster are taken unchecked and only their few fields of interest are read, so that ten thousand
volumes cost the time of their JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from storpool import sptypes
from storpool.spcatch import InvalidArgumentError

from providers.base import InvalidName, PoolUnavailable, Space, Volume, VolumeNotFound
from providers.storpool import tags
from providers.storpool.cluster import Cluster, Missing
from providers.storpool.options import StorPoolOptions

Kind = Literal["volume", "snapshot"]


@dataclass(frozen=True, slots=True)
class Found:
    """One volume or snapshot. `name` is how the cluster lists it, "~" and the global id when it has no other."""

    kind: Kind
    name: str
    global_id: str
    size_bytes: int
    template: str
    parent: str
    tags: dict[str, str]
    used_bytes: int = 0

    @property
    def by_id(self) -> str:
        """How calls name it, whatever it is called meanwhile."""
        return f"~{self.global_id}"

    def is_named_by(self, *words: str) -> bool:
        """Tell whether one of the words is its global id or name."""
        return any(word in (self.global_id, self.name, self.by_id) for word in words if word)


@dataclass(frozen=True, slots=True)
class Attachment:
    """One volume or snapshot on one client; `rights` are "rw" or "ro"."""

    global_id: str
    name: str
    client: int
    rights: str

    @property
    def user(self) -> str:
        """Who that is, in words."""
        return f"StorPool client {self.client} ({self.rights})"

    def is_of(self, found: Found) -> bool:
        """Tell whether that is what is attached."""
        return found.is_named_by(self.global_id, self.name)


class Objects:
    """The volumes and snapshots of one pool, by the cluster's API."""

    def __init__(self, cluster: Cluster, options: StorPoolOptions) -> None:
        """Take the cluster and which of its volumes are the pool."""
        self._cluster = cluster
        self._options = options
        self.scope = tags.scope(options)

    def volume(self, name: str) -> Found:
        """Return a volume of the pool by its name or global id. Raises VolumeNotFound, InvalidName."""
        check_name(name)
        try:
            found = self.any_volume(name)
        except Missing:
            raise VolumeNotFound(f"there is no volume {name}", volume=name) from None
        if not self._is_in_pool(found):
            raise VolumeNotFound(f"volume {name} is in the cluster, but not in this pool", volume=name)
        return found

    def any_volume(self, name: str, *, in_window: bool = False) -> Found:
        """Return a volume of the cluster; `in_window` asks once and does not wait for long. Raises Missing."""
        return _found("volume", _only(self._call(in_window)("volumeList", name, raw=True), name))

    def volumes(self) -> list[Found]:
        """Return the pool's volumes by name, with the room they take; none of Frostgate's own."""
        found = [_found("volume", one) for one in _listed(self._cluster.call("volumesSpace", raw=True))]
        return sorted((one for one in found if self._is_in_pool(one)), key=lambda one: one.name)

    def records(self) -> list[Found]:
        """Return the volumes that have the pool's records."""
        ours = {tags.POOL: self.scope, tags.WHAT: tags.RECORD}.items()
        listed = _listed(self._cluster.call("volumesList", raw=True))
        return [_found("volume", one) for one in listed if ours <= (one.get("tags") or {}).items()]

    def children(self, snapshots: Sequence[Found]) -> list[str]:
        """Return the names of the volumes that are based on snapshots."""
        parents = {name for snapshot in snapshots for name in (snapshot.name, snapshot.by_id)}
        found = [_found("volume", one) for one in _listed(self._cluster.call("volumesList", raw=True))]
        return sorted(one.name for one in found if one.parent in parents)

    def members(self, group: str | None = None, *, in_window: bool = False) -> list[Found]:
        """Return the snapshots that are a group's members (any group's without one), but not those being deleted.

        `in_window` asks once and does not wait for long.
        """
        ours = {tags.POOL: self.scope, tags.WHAT: tags.MEMBER}.items() | ({(tags.GROUP, group)} if group else set())
        return [
            _found("snapshot", one)
            for one in _listed(self._call(in_window)("snapshotsList", raw=True))
            if ours <= (one.get("tags") or {}).items() and not one.get("deleted") and not one.get("destroyed")
        ]

    def attachments(self) -> list[Attachment]:
        """Return all attachments in the cluster."""
        return [
            Attachment(one.get("globalId") or "", str(one["volume"]), int(one["client"]), str(one["rights"]))
            for one in _listed(self._cluster.call("attachmentsList", raw=True))
        ]

    def attachments_of(self, objects: Iterable[Found]) -> list[tuple[Found, Attachment]]:
        """Return where some objects are attached."""
        known = {key: found for found in objects for key in (found.global_id, found.name, found.by_id)}
        pairs = ((known.get(one.global_id) or known.get(one.name), one) for one in self.attachments())
        return [(found, one) for found, one in pairs if found is not None]

    def shown(self, found: Found, attachments: Sequence[Attachment]) -> Volume:
        """Return a volume as the interface has it: in use where it is attached for writing."""
        users = tuple(one.user for one in attachments if one.rights == "rw" and one.is_of(found))
        return Volume(found.name, found.size_bytes, min(found.used_bytes, found.size_bytes), "raw", bool(users), users)

    def space(self) -> Space:
        """Return the room that the template's volumes have."""
        for one in _listed(self._cluster.call("volumeTemplatesStatus", raw=True)):
            if one.get("name") == self._options.template:
                with suppress(KeyError, TypeError, ValueError):
                    stored = one["stored"]
                    capacity = int(stored["capacity"])
                    return Space(capacity, max(0, min(int(stored["free"]), capacity)))
                raise PoolUnavailable(f"the cluster does not tell the space of template {self._options.template}")
        raise PoolUnavailable(f"the cluster has no template {self._options.template}")

    def created(self, name: str, marks: dict[str, str], **more: object) -> None:
        """Make a volume in the pool, with tags of ours. Raises Exists, PoolFull, InvalidName, PoolUnavailable."""
        if self._options.tag is not None and tags.WHAT not in marks:
            key, _, value = self._options.tag.partition("=")
            marks = {**marks, key: value}
        description = {"name": name, "template": self._options.template, "tags": marks, **more}
        self._cluster.call("volumeCreate", description)

    def check_target(self, name: str) -> None:
        """Raise InvalidName for what cannot be a new volume of this pool."""
        check_name(name)
        prefix = self._options.name_prefix or ""
        if name.startswith("~") or name.startswith(tags.RESERVED_PREFIX) or not name.startswith(prefix):
            begin = f"begin with {prefix!r} and " if prefix else ""
            raise InvalidName(
                f"a new volume's name has to {begin}not begin with '~' or '{tags.RESERVED_PREFIX}'", volume=name
            )

    def _call(self, in_window: bool) -> Callable[..., Any]:
        return self._cluster.call_in_window if in_window else self._cluster.call

    def _is_in_pool(self, found: Found) -> bool:
        if tags.WHAT in found.tags or not _is_nameable(found.name):
            return False
        if self._options.name_prefix is not None:
            return found.name.startswith(self._options.name_prefix)
        if self._options.tag is not None:
            key, _, value = self._options.tag.partition("=")
            return found.tags.get(key) == value
        return found.template == self._options.template


def check_name(name: str) -> None:
    """Raise InvalidName for what StorPool cannot call a volume."""
    try:
        sptypes.VolumeNameOrGlobalId.handleVal(name)
    except InvalidArgumentError as error:
        raise InvalidName(f"volume {name!r} is no name or ~global id in StorPool: {error}", volume=name) from None


def _is_nameable(name: str) -> bool:
    """Tell whether the contract can name a volume: some that StorPool allows it cannot."""
    return name[0] not in ".-" and ".." not in name


def _found(kind: Kind, one: dict[str, Any]) -> Found:
    try:
        return Found(
            kind=kind,
            name=str(one["name"]),
            global_id=str(one["globalId"]),
            size_bytes=int(one["size"]),
            template=str(one.get("templateName") or ""),
            parent=str(one.get("parentName") or ""),
            tags={str(key): str(value) for key, value in (one.get("tags") or {}).items()},
            used_bytes=int(one.get("spaceUsed") or 0),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PoolUnavailable(f"the StorPool API describes an object in words not understood: {error}") from error


def _listed(answer: Any) -> list[dict[str, Any]]:
    if not isinstance(answer, list) or not all(isinstance(one, dict) for one in answer):
        raise PoolUnavailable("the StorPool API gives something else than the list that was asked for")
    return answer


def _only(answer: Any, name: str) -> dict[str, Any]:
    listed = _listed(answer)
    if len(listed) != 1:
        raise Missing(f"the StorPool API knows {len(listed)} objects called {name}")
    return listed[0]
