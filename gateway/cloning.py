"""New volumes from the members of a group snapshot, in pools that can."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from frostgate.v1 import snapshot_provider_pb2 as rpc
from gateway import states
from gateway.errors import Refused
from gateway.groups import Core
from gateway.journal import Group
from gateway.streaming import readable
from providers.base import Volume


async def clone(core: Core, group: Group, clones: Sequence[rpc.CloneSpec]) -> list[Volume]:
    """Make new volumes; every pool is asked first whether it can, so that nothing is half done for that.

    Raises Refused (MEMBER_NOT_FOUND, STATE_INVALID, CAPABILITY_MISSING) and what the provider raises.
    """
    for wanted in clones:
        pool = core.pools.get(wanted.source.pool)
        if not (await pool.ask(pool.provider.capabilities)).clone:
            raise Refused("CAPABILITY_MISSING", f"pool {pool.name} cannot clone", pool=pool.name, capability="clone")
        readable(core, group, wanted.source)
    if group.snapshot.state != states.READY:
        raise Refused("STATE_INVALID", f"group snapshot {group.id} is not READY", group_snapshot=group.id)
    volumes = []
    for wanted in clones:
        pool = core.pools.get(wanted.source.pool)
        report = core.live(group.id).reporter(pool.name)
        make = partial(pool.provider.clone, group.id, wanted.source.volume, wanted.target_volume, report)
        volumes.append(await pool.work.run(None, make))
    return volumes
