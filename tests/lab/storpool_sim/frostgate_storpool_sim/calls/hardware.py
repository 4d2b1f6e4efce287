"""Disks and what is upon them: three servers with a spinning and a solid disk each, which never fail.

Placement groups name disks; nothing is really placed. What is told of scrubbing and ejecting is what was asked for.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from storpool import sptypes

from frostgate_storpool_sim.calls.answers import ok
from frostgate_storpool_sim.catalog import Disk, Item, PlacementGroup, Template
from frostgate_storpool_sim.cluster import Cluster
from frostgate_storpool_sim.errors import busy, missing
from frostgate_storpool_sim.routes import Call


def disks(cluster: Cluster, call: Call) -> dict[int, Any]:
    """DisksList and ServerDisksList."""
    server = call.arguments.get("serverId")
    return {disk.number: _summary(cluster, disk) for disk in _disks(cluster) if server in (None, disk.server)}


def disk(cluster: Cluster, call: Call) -> dict[str, Any]:
    """DiskDescribe and ServerDiskDescribe: no objects."""
    return {**_summary(cluster, _disk(cluster, call)), "objects": {}}


def disk_requests(cluster: Cluster, call: Call) -> dict[str, Any]:
    """DiskActiveRequests: none."""
    return {"diskId": _disk(cluster, call).number, "requests": []}


def describe_disk(cluster: Cluster, call: Call) -> dict[str, Any]:
    """DiskSetDescription."""
    cluster.commit([replace(_disk(cluster, call), description=call.json.description)])
    return ok(cluster)


def soft_eject(cluster: Cluster, call: Call) -> dict[str, Any]:
    """DiskSoftEject, DiskSoftEjectPause, DiskSoftEjectCancel."""
    state = {"diskSoftEject": "on", "diskSoftEjectPause": "paused", "diskSoftEjectCancel": "off"}
    cluster.commit([replace(_disk(cluster, call), soft_eject=state[call.route.function])])
    return ok(cluster)


def scrub(cluster: Cluster, call: Call) -> dict[str, Any]:
    """DiskScrubStart, DiskScrubPause, DiskScrubContinue: a paused disk that is started stays paused."""
    found = _disk(cluster, call)
    now = int(time.time())
    if call.route.function == "diskScrubPause":
        found = replace(found, paused_at=now)
    elif call.route.function == "diskScrubContinue":
        found = replace(found, paused_at=0)
    else:
        found = replace(found, scrubbing_since=now, paused_at=now if found.paused_at else 0)
    cluster.commit([found])
    return ok(cluster)


def retrim(cluster: Cluster, call: Call) -> dict[str, Any]:
    """DiskRetrim: nothing to do."""
    _disk(cluster, call)
    return ok(cluster)


def groups(cluster: Cluster, call: Call) -> dict[str, Any]:
    """PlacementGroupsList."""
    return {group.name: _group(group) for group in placement_groups(cluster).values()}


def group(cluster: Cluster, call: Call) -> dict[str, Any]:
    """PlacementGroupDescribe."""
    return _group(_group_named(cluster, call))


def update_group(cluster: Cluster, call: Call) -> dict[str, Any]:
    """PlacementGroupUpdate: makes it when it is not there."""
    asked = call.json
    name = call.arguments["placementGroupName"]
    old = placement_groups(cluster).get(name) or PlacementGroup(name, cluster.next_number())
    known = {found.number for found in _disks(cluster)}
    for number in sorted(asked.addDisks - known):
        raise missing("Disk", str(number))
    numbers = sorted((set(old.disks) | asked.addDisks) - asked.rmDisks)
    new = replace(old, name=asked.rename or name, disks=tuple(numbers))
    cluster.commit([new], [old] if new.name != name else [])
    return ok(cluster)


def delete_group(cluster: Cluster, call: Call) -> dict[str, Any]:
    """PlacementGroupDelete; refused while something names it."""
    found = _group_named(cluster, call)
    policies = [item.policy for item in cluster.items.values()]
    policies += [template.policy for template in cluster.table(Template).values()]
    if any(found.name in (policy.place_all, policy.place_tail, policy.place_head) for policy in policies):
        raise busy(f"PlacementGroup '{found.name}' is in use.")
    cluster.commit([], [found])
    return ok(cluster)


def placement_groups(cluster: Cluster) -> dict[str, PlacementGroup]:
    """Return every placement group by name."""
    return cluster.table(PlacementGroup)


def fault_sets(cluster: Cluster, call: Call) -> dict[str, Any]:
    """FaultSetsList: none."""
    return {}


def relocator(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeRelocatorStatus: nothing to do."""
    return {"status": "on", "volumesToRelocate": 0, "recoveringFromRemote": 0}


def targets(cluster: Cluster, call: Call) -> dict[int, Any]:
    """The relocator's and the balancer's estimates: nothing moves."""
    if "volumeName" in call.arguments:
        cluster.volume(call.arguments["volumeName"])
    elif "snapshotName" in call.arguments:
        cluster.snapshot(call.arguments["snapshotName"])
    nothing = {"current": 0, "target": 0, "delta": 0, "toRecover": 0}
    counts = {"objectsAllocated": nothing, "storedSize": nothing, "onDiskSize": nothing}
    return {
        found.number: {
            "id": found.number,
            "serverId": found.server,
            "generationLeft": sptypes.GENERATION_NONE,
            "objectsCount": _OBJECTS,
            **counts,
        }
        for found in _disks(cluster)
    }


def balancer(cluster: Cluster, call: Call) -> dict[str, Any]:
    """VolumeBalancerStatus: nothing to do."""
    return {"status": "nothing to do", "auto": False}


def balanced(cluster: Cluster, call: Call) -> list[Any]:
    """VolumeBalancerVolumesStatus: none is to be moved."""
    return [_balanced(item) for item in cluster.items.values()]


_OBJECTS = 100_000


def _disks(cluster: Cluster) -> list[Disk]:
    return sorted(cluster.table(Disk).values(), key=lambda found: found.number)


def _disk(cluster: Cluster, call: Call) -> Disk:
    number = call.arguments["diskId"]
    found = cluster.table(Disk).get(str(number))
    if found is None or call.arguments.get("serverId", found.server) != found.server:
        raise missing("Disk", str(number))
    return found


def _group_named(cluster: Cluster, call: Call) -> PlacementGroup:
    name = call.arguments["placementGroupName"]
    try:
        return placement_groups(cluster)[name]
    except KeyError:
        raise missing("PlacementGroup", name) from None


def _group(found: PlacementGroup) -> dict[str, Any]:
    return {"id": found.number, "name": found.name, "disks": list(found.disks)}


def _balanced(item: Item) -> dict[str, Any]:
    return {
        "name": item.shown_name,
        "placeAll": item.policy.place_all,
        "placeTail": item.policy.place_tail,
        "placeHead": item.policy.place_head,
        "replication": item.policy.replication,
        "size": item.size_bytes,
        "objectsCount": 1,
        "snapshot": item.snapshot,
        "reallocated": False,
        "blocked": False,
    }


def _summary(cluster: Cluster, found: Disk) -> dict[str, Any]:
    """An UpDiskSummary: the disks of a kind share what the cluster holds."""
    now = int(time.time())
    sectors = cluster.settings.capacity_bytes // 512
    return {
        "id": found.number,
        "serverId": found.server,
        "ssd": found.ssd,
        "generationLeft": sptypes.GENERATION_NONE,
        "model": "simulated",
        "serial": f"SIM{found.number}",
        "description": found.description,
        "softEject": found.soft_eject,
        "sectorsCount": sectors,
        "empty": False,
        "device": f"/dev/sim{found.number}",
        **dict.fromkeys(("noFua", "noFlush", "noTrim", "isWbc", "journaled"), False),
        **dict.fromkeys(("agCount", "agAllocated", "agFree", "agFull", "agPartial", "agFreeing"), 0),
        **dict.fromkeys(("agMaxSizeFull", "agMaxSizePartial"), 0),
        **{"entriesCount": _OBJECTS, "entriesAllocated": 0, "entriesFree": _OBJECTS},
        **{"objectsCount": _OBJECTS, "objectsAllocated": 0, "objectsFree": _OBJECTS},
        "objectsOnDiskSize": cluster.layers.used_bytes(),
        "aggregateScore": {"entries": 0, "space": 0, "total": 0},
        "wbc": None,
        "scrubbingStartedBefore": now - found.scrubbing_since if found.scrubbing_since else 0,
        "scrubbedBytes": 0,
        "scrubbingBW": 0,
        "scrubbingFinishAfter": 0,
        "scrubbingPausedFor": now - found.paused_at if found.paused_at else 0,
        "scrubbingPaused": bool(found.paused_at),
        "lastScrubCompleted": 0,
    }


CALLS = {
    "disksList": disks,
    "serverDisksList": disks,
    "diskDescribe": disk,
    "serverDiskDescribe": disk,
    "diskActiveRequests": disk_requests,
    "diskSetDesc": describe_disk,
    "diskSoftEject": soft_eject,
    "diskSoftEjectPause": soft_eject,
    "diskSoftEjectCancel": soft_eject,
    "diskScrubStart": scrub,
    "diskScrubPause": scrub,
    "diskScrubContinue": scrub,
    "diskRetrim": retrim,
    "placementGroupsList": groups,
    "placementGroupDescribe": group,
    "placementGroupUpdate": update_group,
    "placementGroupDelete": delete_group,
    "faultSetsList": fault_sets,
    "volumeRelocatorStatus": relocator,
    "volumeRelocatorDisks": targets,
    "volumeRelocatorVolumeDisks": targets,
    "volumeRelocatorSnapshotDisks": targets,
    "volumeBalancerGetStatus": balancer,
    "volumeBalancerVolumesStatus": balanced,
    "volumeBalancerDisks": targets,
    "volumeBalancerVolumeDisks": targets,
    "volumeBalancerSnapshotDisks": targets,
}
