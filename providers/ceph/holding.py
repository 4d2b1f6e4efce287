"""The volumes that reverts hold from prepare_revert() on: open and locked, so that nobody else writes to them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import rbd

from providers.base import Extent, VolumeInUse
from providers.ceph.cluster import Cluster
from providers.ceph.images import current_id, lock_for_us, users


@dataclass
class Held:
    """A volume that is being reverted: its image, open and locked, and where it differs from the snapshot."""

    volume: str
    image: Any
    windows: list[Extent] = field(default_factory=list)

    def close(self) -> None:
        """Give the lock back."""
        self.image.close()


class Holds:
    """What is held, by the group whose revert it is. Thread-safe."""

    def __init__(self, cluster: Cluster) -> None:
        """Take the cluster; nothing is held yet."""
        self._cluster = cluster
        self._lock = threading.Lock()
        self._held: dict[str, list[Held]] = {}

    def take(self, context: Any, group: str, volumes: Sequence[str]) -> list[Held]:
        """Hold those of the volumes that are not lost, all or none. Raises VolumeInUse."""
        own_id = self._cluster.client_id()
        held: list[Held] = []
        with self._lock:
            self._held[group] = held
        try:
            for volume in volumes:
                if one := _hold(context, volume, own_id):
                    held.append(one)
        except BaseException:
            self.release(group)
            raise
        return held

    def of(self, group: str) -> list[Held] | None:
        """Return what is held for a group, None when it is another process that took it."""
        with self._lock:
            return self._held.get(group)

    def release(self, group: str) -> None:
        """Let go what is held for a group; fine when there is nothing."""
        with self._lock:
            held = self._held.pop(group, [])
        for one in held:
            one.close()

    @contextmanager
    def lent(self, image_ids: set[str]) -> Iterator[None]:
        """Give back, for one cut, the locks on these images; the cut takes them itself. Raises VolumeInUse."""
        with self._lock:
            held = [one for group in self._held.values() for one in group if one.image.id() in image_ids]
        for one in held:
            unlock(one)
        try:
            yield
        finally:
            for one in held:
                _relock(one, self._cluster.client_id())

    def close(self) -> None:
        """Let everything go."""
        for group in list(self._held):
            self.release(group)


def unlock(held: Held) -> None:
    """Give the lock back for a moment: the safety snapshot's cut needs it."""
    if held.image.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK and held.image.is_exclusive_lock_owner():
        held.image.lock_release()


def _hold(context: Any, volume: str, own_id: int) -> Held | None:
    """Open and lock a volume so that nobody writes to it; None when it is lost. Raises VolumeInUse."""
    if current_id(context, volume) is None:
        return None
    image = rbd.Image(context, volume)
    held = Held(volume, image)
    try:
        _relock(held, own_id)
    except BaseException:
        image.close()
        raise
    return held


def _relock(held: Held, own_id: int) -> None:
    """Take the lock (again), unless somebody has opened the volume meanwhile. Raises VolumeInUse."""
    busy = users(held.image, own_id)
    if busy:
        raise VolumeInUse(
            f"volume {held.volume} is in use by {', '.join(busy)}; stop it first",
            volume=held.volume,
            users=", ".join(busy),
        )
    lock_for_us(held.image, held.volume, own_id)
