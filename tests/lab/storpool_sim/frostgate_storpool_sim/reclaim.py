"""Giving room back: snapshots that go when nothing needs them any more, layers that nobody sees, layers that merge."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace

import structlog

from frostgate_storpool_sim.catalog import Item, LayerRecord, Record
from frostgate_storpool_sim.cluster import Cluster, record_of
from frostgate_storpool_sim.layers import Layer

_CHUNKS = 256
_EVERY_S = 0.5
_log = structlog.get_logger()


class Reclaimer:
    """Does it in the background, for all clusters."""

    def __init__(self, clusters: list[Cluster]) -> None:
        """Take the clusters."""
        self._clusters = clusters
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reclaimer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Return when it has ended."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            for cluster in self._clusters:
                try:
                    with cluster.lock:
                        collect(cluster)
                    while not self._ended.is_set() and merge(cluster):
                        pass
                except Exception:
                    _log.exception("reclaiming_failed", cluster=cluster.settings.name)


def collect(cluster: Cluster) -> None:
    """Remove snapshots whose time has come, and layers that nobody sees. The caller holds the cluster's lock.

    A deleted snapshot upon which several volumes or snapshots are stays, listed as deleted, until there is one at most.
    """
    while True:
        upon = Counter(record.parent for record in cluster.table(LayerRecord).values())
        late = [item for item in cluster.items.values() if _is_late(cluster, item, upon[item.layer])]
        gone = [item for item in cluster.items.values() if _is_gone(cluster, item, upon[item.layer])]
        seen = {item.layer for item in cluster.items.values() if item not in gone}
        unseen = [r for r in cluster.table(LayerRecord).values() if r.name not in seen and not upon[r.name]]
        if not late and not gone and not unseen:
            return
        removed: list[Record] = [*gone, *unseen]
        with cluster.bytes_lock:
            cluster.commit([replace(item, deleted_at=time.time()) for item in late], removed)
            for record in unseen:
                cluster.layers.remove(cluster.layers.open[record.name])


def merge(cluster: Cluster) -> bool:
    """Give a layer that only another one needs to that one; False when there is none. Needs no lock."""
    with cluster.lock:
        found = _mergeable(cluster)
        if found is None:
            return False
        below, above = found
        with cluster.bytes_lock:
            runs = list(below.runs())
    for first, count in runs:
        for start in range(first, first + count, _CHUNKS):
            with cluster.bytes_lock:
                if not _still(cluster, below, above):
                    return True
                above.take_over(start, min(_CHUNKS, first + count - start))
    with cluster.lock, cluster.bytes_lock:
        if _still(cluster, below, above):
            above.skip_parent()
            cluster.commit([record_of(above)], [cluster.table(LayerRecord)[below.name]])
            cluster.layers.remove(below)
    return True


def _is_late(cluster: Cluster, item: Item, upon: int) -> bool:
    """Whether a snapshot is to be deleted now: by its date, or because it is bound and nothing is upon it any more."""
    if not item.snapshot or item.deleted or cluster.attachments(item):
        return False
    return 0 < item.delete_at <= time.time() or (item.bound and not upon)


def _is_gone(cluster: Cluster, item: Item, upon: int) -> bool:
    return item.deleted_at is not None and upon < 2 and time.time() >= item.deleted_at + cluster.settings.deletion_s


def _mergeable(cluster: Cluster) -> tuple[Layer, Layer] | None:
    seen = {item.layer for item in cluster.items.values()}
    upon = Counter(record.parent for record in cluster.table(LayerRecord).values())
    for record in cluster.table(LayerRecord).values():
        if record.parent and record.parent not in seen and upon[record.parent] == 1:
            return cluster.layers.open[record.parent], cluster.layers.open[record.name]
    return None


def _still(cluster: Cluster, below: Layer, above: Layer) -> bool:
    return cluster.layers.open.get(above.name) is above and above.parent is below
