"""Reading a member: an image of its own, open at the snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from providers.base import BlockReader, Extent
from providers.ceph import changes, images
from providers.ceph.changes import View
from providers.ceph.cluster import Cluster
from providers.ceph.store import Manifest


class RbdReader(BlockReader):
    """One member of a settled snapshot."""

    def __init__(self, cluster: Cluster, manifest: Manifest, volume: str) -> None:
        """Open it. Raises SnapshotNotFound, PoolUnavailable."""
        self._cluster = cluster
        with ExitStack() as stack:
            context = stack.enter_context(cluster.opened())
            self._image = stack.enter_context(images.opened_member(context, manifest, volume))
            self._view = View(self._image, manifest.member(volume).snap_id)
            self.size_bytes = int(self._image.size())
            self._open = stack.pop_all()

    def read(self, offset: int, length: int) -> bytes:
        """See BlockReader."""
        with self._cluster.errors():
            content: bytes = self._image.read(offset, length)
            return content

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See BlockReader."""
        with self._cluster.errors():
            yield from changes.allocated(self._view, offset, length, coarse=False)

    def close(self) -> None:
        """See BlockReader."""
        self._open.close()
