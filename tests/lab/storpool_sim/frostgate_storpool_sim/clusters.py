"""Several clusters behind one API: which of them does what part of a call.

A plain call is the local cluster's; RemoteCommand/NAME names another one. A MultiCluster call lists what all of them
have, and finds what it names wherever that is; what it names must be in one cluster, but for attaching.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from frostgate_storpool_sim import reclaim, routes
from frostgate_storpool_sim.calls import HANDLERS
from frostgate_storpool_sim.catalog import Item
from frostgate_storpool_sim.cluster import Cluster
from frostgate_storpool_sim.errors import Refused, invalid, missing
from frostgate_storpool_sim.routes import Call

_LOCAL = ("volumeCreate",)
"""Without a parent, new things are made in the local cluster."""


class Clusters:
    """The local cluster, then those that it knows. Any thread."""

    def __init__(self, clusters: list[Cluster]) -> None:
        """Take them; the first is the local one."""
        self.all = clusters

    def of(self, global_id: str) -> Cluster:
        """Return the cluster in which something was made. Raises KeyError."""
        return {cluster.settings.cluster_id: cluster for cluster in self.all}[global_id.rpartition(".")[0]]

    def answer(self, call: Call) -> bytes:
        """Do a call and return the answer's JSON. Raises Refused."""
        if call.route.function not in HANDLERS:
            raise Refused("notSupported", f"The simulator does not have {call.route.query}.", status=501)
        data, generation = None, 0
        for cluster, part in self._parts(call):
            with cluster.lock:
                more = HANDLERS[call.route.function](cluster, part)
                generation = cluster.generation
                if call.route.method == "POST":
                    reclaim.collect(cluster)
            data = _together(data, more)
        return b'{"generation":%d,"data":%s}' % (generation, routes.encoded(call.route, data))

    def _parts(self, call: Call) -> list[tuple[Cluster, Call]]:
        here = self._named(call.cluster) if call.cluster else self.all[0]
        if not call.multi_cluster or len(self.all) == 1:
            return [(here, call)]
        asked = _reassigned(call)
        if asked is not None:
            owners = [self._owner([_name(each)], here) for each in asked]
            return [
                (cluster, _only(call, [each for each, owner in zip(asked, owners, strict=True) if owner is cluster]))
                for cluster in self.all
                if cluster in owners
            ]
        names = list(_names(call))
        if names or call.route.function in _LOCAL or call.route.method == "POST":
            return [(self._owner(names, here), call)]
        return [(cluster, call) for cluster in self.all]

    def _named(self, name: str) -> Cluster:
        for cluster in self.all:
            if name in (cluster.settings.name, f"~{cluster.settings.cluster_id}"):
                return cluster
        raise missing("Cluster", name)

    def _owner(self, names: list[str], here: Cluster) -> Cluster:
        """Return the cluster that has what is named; `here` when none has."""
        found = {name: next((c for c in (here, *self.all) if _has(c, name)), here) for name in names}
        owners = list(dict.fromkeys(found.values())) or [here]
        if len(owners) > 1:
            raise invalid(f"Not in one cluster: {', '.join(names)}")
        return owners[0]


def _has(cluster: Cluster, name: str) -> bool:
    with cluster.lock:
        items: Iterable[Item] = cluster.items.values()
        return any(name in (item.name, f"~{item.global_id}", item.global_id) and not item.deleted for item in items)


def _names(call: Call) -> Iterable[str]:
    yield from map(str, call.arguments.values())
    for name in ("parent", "baseOn", "toSnapshot"):
        if found := getattr(call.json, name, None):
            yield found
    for each in getattr(call.json, "volumes", None) or ():
        yield each.volume


def _reassigned(call: Call) -> list[Any] | None:
    if call.route.function == "volumesReassign":
        return list(call.json)
    return list(call.json.reassign) if call.route.function == "volumesReassignWait" else None


def _only(call: Call, part: list[Any]) -> Call:
    if call.route.function == "volumesReassign":
        return replace(call, json=part)
    return replace(call, json=type(call.json)({**call.json.to_json(), "reassign": part}))


def _name(asked: Any) -> str:
    name: str = asked.volume if hasattr(asked, "volume") else asked.snapshot
    return name


def _together(data: Any, more: Any) -> Any:
    if isinstance(data, list) and isinstance(more, list):
        return data + more
    if isinstance(data, dict) and isinstance(more, dict):
        return {**data, **more}
    return more
