"""Templates and the settings that volumes and snapshots take from them or are given themselves; tags."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from frostgate_storpool_sim.catalog import PlacementGroup, Policy, Template
from frostgate_storpool_sim.cluster import Cluster
from frostgate_storpool_sim.errors import invalid, missing

MAX_TAGS = 256
"""How many tags a volume may have. StorPool's own limit is not known publicly."""


def template_named(cluster: Cluster, name: str) -> Template:
    """Return a template. Raises Refused(objectDoesNotExist)."""
    try:
        return cluster.table(Template)[name]
    except KeyError:
        raise missing("VolumeTemplate", name) from None


def changed(policy: Policy, asked: Any) -> Policy:
    """Return a policy with what a VolumePolicyDesc asks for."""
    given = {
        "replication": asked.replication,
        "place_all": asked.placeAll,
        "place_tail": asked.placeTail,
        "place_head": asked.placeHead,
        "bw": asked.bw,
        "iops": asked.iops,
        "reuse_server": asked.reuseServer,
    }
    return replace(policy, **{key: value for key, value in given.items() if value is not None})


def complete(cluster: Cluster, policy: Policy) -> Policy:
    """Return a policy that a volume can have. Raises Refused. Source of the defaults: StorPool's CLI reference."""
    if policy.replication is None:
        raise invalid("Missing replication: name a template or say how many replicas.")
    place_all = policy.place_all or "default"
    places = (place_all, policy.place_tail or place_all, policy.place_head or place_all)
    for place in places:
        if place not in cluster.table(PlacementGroup):
            raise missing("PlacementGroup", place)
    return replace(policy, place_all=places[0], place_tail=places[1], place_head=places[2])


def tagged(tags: dict[str, str], *asked: dict[str, str] | None) -> dict[str, str]:
    """Return tags with others put in; an empty value takes one out. Raises Refused(invalidParam)."""
    merged = dict(tags)
    for more in asked:
        merged.update(more or {})
    merged = {name: value for name, value in merged.items() if value}
    if len(merged) > MAX_TAGS:
        raise invalid(f"At most {MAX_TAGS} tags.")
    return merged
