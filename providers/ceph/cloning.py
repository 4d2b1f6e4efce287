"""New images from members: copy-on-write clones where this Ceph can clone the snapshot, else full, sparse copies.

A volume is made under a hidden name and renamed when it is whole; what it was made of is kept in its metadata.
"""

from __future__ import annotations

from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

import rbd

from providers.base import CapabilityMissing, ReportProgress, SnapshotNotFound, VolumeExists
from providers.ceph import changes
from providers.ceph.changes import View
from providers.ceph.cluster import Cluster
from providers.ceph.images import HIDDEN, current_id, opened, opened_hidden, opened_member
from providers.ceph.store import Manifest, StoredMember

_CLONE_OF = "frostgate.clone"
_FEATURES = (
    rbd.RBD_FEATURE_LAYERING
    | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
    | rbd.RBD_FEATURE_OBJECT_MAP
    | rbd.RBD_FEATURE_FAST_DIFF
    | rbd.RBD_FEATURE_DEEP_FLATTEN
)


def make_volume(
    cluster: Cluster,
    context: Any,
    manifest: Manifest,
    volume: str,
    target: str,
    progress: ReportProgress,
    executor: Executor,
) -> None:
    """Make a volume of a member, whole or not at all. One that this has made before is left as it is.

    Raises VolumeExists, SnapshotNotFound, PoolFull, Cancelled.
    """
    mark = f"{manifest.group}/{volume}"
    member = manifest.member(volume)
    if current_id(context, target) is None:
        hidden = f"{HIDDEN}clone.{target}"
        with suppress(rbd.ImageNotFound):
            rbd.RBD().remove(context, hidden)
        if member.kind == "snapshot":
            progress(0, 0)
            clone(cluster, context, manifest, member, hidden)
        else:
            _copy(cluster, context, manifest, member, hidden, progress, executor)
        with opened_hidden(context, hidden) as image:
            image.metadata_set(_CLONE_OF, mark)
        rbd.RBD().rename(context, hidden, target)
    with opened(context, target) as image:
        if dict(image.metadata_list()).get(_CLONE_OF) != mark:
            raise VolumeExists(f"there is an image {target} already", volume=target)


def clone(cluster: Cluster, context: Any, manifest: Manifest, member: StoredMember, name: str) -> None:
    """Make a copy-on-write clone of a member under a name. Raises CapabilityMissing, SnapshotNotFound."""
    if member.kind != "snapshot":
        raise CapabilityMissing(
            f"the snapshot of {member.volume} in {manifest.group} is an RBD group's, which this Ceph cannot clone: "
            'take snapshots with cut = "parallel" for that, or leave `instant` out',
            volume=member.volume,
            capability="instant_revert",
        )
    with opened_member(context, manifest, member.volume) as snapshot:
        try:
            parent = snapshot.get_name()
            rbd.RBD().clone(
                context,
                parent,
                manifest.rbd_name,
                context,
                name,
                features=_features(snapshot),
                order=snapshot.stat()["order"],
                data_pool=_data_pool(cluster, snapshot),
            )
        except rbd.ImageNotFound:
            raise SnapshotNotFound(
                f"the image of {member.volume} is in the trash: `rbd trash restore {member.image_id}` first",
                group=manifest.group,
                volume=member.volume,
            ) from None


def make_alike(cluster: Cluster, context: Any, image: Any, name: str) -> None:
    """Make an empty image with the size, object size and features of another."""
    unit, count = image.stripe_unit(), image.stripe_count()
    order = image.stat()["order"]
    striping = {} if count == 1 and unit == 1 << order else {"stripe_unit": unit, "stripe_count": count}
    data_pool = _data_pool(cluster, image)
    rbd.RBD().create(
        context, name, image.size(), order, old_format=False, features=_features(image), data_pool=data_pool, **striping
    )


def _copy(
    cluster: Cluster,
    context: Any,
    manifest: Manifest,
    member: StoredMember,
    target: str,
    progress: ReportProgress,
    executor: Executor,
) -> None:
    try:
        with opened_member(context, manifest, member.volume) as snapshot:
            source = View(snapshot, member.snap_id)
            make_alike(cluster, context, snapshot, target)
            with opened_hidden(context, target) as image:
                windows = list(changes.windows(View(image, None), source, cluster.open_data, executor))
                total, done = sum(window.length for window in windows), 0
                cluster.check_room(total)
                progress(0, total)
                for length in changes.set_equal(source, image, windows, executor):
                    done += length
                    progress(done, total)
    except BaseException:
        with suppress(rbd.Error):
            rbd.RBD().remove(context, target)
        raise


def _features(image: Any) -> int:
    """Return the features that a new image can be made with: not those that a state of the image brings."""
    features: int = image.features() & _FEATURES
    return features


def _data_pool(cluster: Cluster, image: Any) -> str | None:
    """Return the name of the pool that has an image's objects, None when it is the image's own."""
    name = str(cluster.connection().pool_reverse_lookup(image.data_pool_id()))
    return None if name == cluster.rbd_pool else name
