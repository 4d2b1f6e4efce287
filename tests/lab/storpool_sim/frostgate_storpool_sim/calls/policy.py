"""Templates and the settings that volumes and snapshots take from them or are given themselves; tags."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from frostgate_storpool_sim.catalog import Policy, Template
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


def complete(policy: Policy) -> Policy:
    """Return a policy that a volume can have. Raises Refused(invalidParam)."""
    if policy.replication is None:
        raise invalid("Missing replication: name a template, or the replication and placeAll.")
    if not policy.place_all:
        raise invalid("Missing placeAll: name a template, or the replication and placeAll.")
    return replace(
        policy, place_tail=policy.place_tail or policy.place_all, place_head=policy.place_head or policy.place_all
    )


def tagged(tags: dict[str, str], *asked: dict[str, str] | None) -> dict[str, str]:
    """Return tags with others put in; an empty value takes one out. Raises Refused(invalidParam)."""
    merged = dict(tags)
    for more in asked:
        merged.update(more or {})
    merged = {name: value for name, value in merged.items() if value}
    if len(merged) > MAX_TAGS:
        raise invalid(f"At most {MAX_TAGS} tags.")
    return merged
