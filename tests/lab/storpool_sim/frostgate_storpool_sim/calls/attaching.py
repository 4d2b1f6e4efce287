"""Attaching volumes and snapshots to clients, and detaching them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from storpool import sptypes

from frostgate_storpool_sim.calls.answers import ok
from frostgate_storpool_sim.catalog import Attachment, Item, Record
from frostgate_storpool_sim.cluster import Cluster
from frostgate_storpool_sim.errors import Refused, busy, invalid
from frostgate_storpool_sim.routes import Call

_CLOSING_S = 1.0
"""A file's close comes a little after the program's close(): so long a detach waits before it says busy."""


@dataclass(frozen=True)
class Change:
    """What becomes of one volume's or snapshot's attachments: client to rights, "" for detached."""

    item: Item
    rights: dict[int, str]
    force: bool


def reassign(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumesReassign: a list of changes, all or none."""
    return _apply(cluster, [_change(cluster, asked) for asked in call.json])


def reassign_wait(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumesReassignWait: the same; devices are there, or gone, in the simulator's every answer."""
    return _apply(cluster, [_change(cluster, asked) for asked in call.json.reassign])


def attachments(cluster: Cluster, call: Call) -> list[dict[str, Any]]:
    """AttachmentsList: who has what."""
    found = []
    for held in sorted(cluster.table(Attachment).values(), key=lambda held: (held.client, held.position)):
        item = cluster.items[held.global_id]
        # the bindings let no name with "@" be here, as snapshots without a name of their own have
        answer = {
            "volume": f"~{item.global_id}" if "@" in item.shown_name else item.shown_name,
            "globalId": held.global_id,
            "snapshot": item.snapshot,
            "client": held.client,
            "rights": held.rights,
            "pos": held.position,
        }
        if call.multi_cluster:
            answer |= {"cluster": cluster.settings.name, "clusterId": cluster.settings.cluster_id}
        found.append(answer)
    return found


def _change(cluster: Cluster, asked: Any) -> Change:
    snapshot = isinstance(asked, sptypes.SnapshotReassignDesc)
    item = cluster.snapshot(asked.snapshot) if snapshot else cluster.volume(asked.volume)
    wanted: dict[int, str] = {}
    for rights, clients in (("ro", asked.ro), ("rw", None if snapshot else asked.rw)):
        for client in clients or ():
            if wanted.setdefault(client, rights) != rights:
                raise invalid(f"Client {client} is given both ro and rw.")
    for client in wanted:
        if client not in cluster.settings.clients:
            raise invalid("No such client registered")
    holding = [held.client for held in cluster.attachments(item)]
    leaving = holding if asked.detach == "all" else asked.detach or ()
    return Change(item, {**{client: "" for client in leaving if client not in wanted}, **wanted}, asked.force)


def _apply(cluster: Cluster, changes: list[Change]) -> dict[str, Any]:
    held = dict(cluster.table(Attachment))
    for change in changes:
        for client, rights in change.rights.items():
            key = Attachment(change.item.global_id, client, rights, 0).key
            before = held.pop(key, None)
            if before and (not rights or (before.rights == "rw" and rights == "ro")):
                _require_closed(cluster, change, client)
            if rights:
                position = before.position if before else _free_position(held.values(), client)
                held[key] = Attachment(change.item.global_id, client, rights, position)
    old = dict(cluster.table(Attachment))
    removed: list[Record] = [record for key, record in old.items() if key not in held]
    kept: list[Record] = [record for key, record in held.items() if old.get(key) != record]
    cluster.commit(kept, removed)
    try:
        cluster.show_devices()
    except OSError as error:
        undone: list[Record] = [record for key, record in old.items() if held.get(key) != record]
        cluster.commit(undone, [record for record in kept if record.key not in old])
        cluster.show_devices()
        raise Refused("internalError", str(error)) from error
    return ok(cluster)


def _require_closed(cluster: Cluster, change: Change, client: int) -> None:
    """Raises Refused(busy). Source: os-brick's tests have the text."""
    if change.force or client != cluster.settings.client:
        return
    deadline = time.monotonic() + _CLOSING_S
    while cluster.host.is_open(change.item.global_id):
        if time.monotonic() > deadline:
            raise busy(f"'{change.item.shown_name}' is open at client {client}")
        time.sleep(0.01)


def _free_position(held: Any, client: int) -> int:
    taken = {attachment.position for attachment in held if attachment.client == client}
    free = next((position for position in range(sptypes.MAX_CLIENT_DISKS) if position not in taken), None)
    if free is None:
        raise invalid(f"Client {client} has {sptypes.MAX_CLIENT_DISKS} attachments already.")
    return free


CALLS = {
    "volumesReassign": reassign,
    "volumesReassignWait": reassign_wait,
    "attachmentsList": attachments,
}
