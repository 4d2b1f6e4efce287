"""New volumes from the members of a group snapshot, in pools that can."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from frostgate.v1 import snapshot_provider_pb2 as rpc
from gateway import states
from gateway.errors import Refused
from gateway.groups import Core, Live, log
from gateway.journal import Group
from gateway.streaming import readable
from gateway.taking import found
from providers.base import Volume


async def clone(core: Core, group_id: str, clones: Sequence[rpc.CloneSpec]) -> list[Volume]:
    """Make new volumes; every pool is asked first whether it can, so that nothing is half done for that.

    It goes on when the client goes away; a repeat then waits for it and returns what it has made. Nothing else is
    done with the group snapshot meanwhile. Raises Refused (MEMBER_NOT_FOUND, STATE_INVALID, CAPABILITY_MISSING) and
    what the provider raises.
    """

    async def work(live: Live) -> list[Volume]:
        group = await found(core, group_id)
        await _check(core, group, clones)
        live.begin()
        volumes = []
        for wanted in clones:
            pool = core.pools.get(wanted.source.pool)
            report = live.reporter(pool.name)
            make = partial(pool.provider.clone, group.id, wanted.source.volume, wanted.target_volume, report)
            volumes.append(await pool.work.run(None, make))
        log.info("cloned", group=group_id, volumes=[volume.name for volume in volumes])
        return volumes

    return await core.exclusive(group_id, work)


async def _check(core: Core, group: Group, clones: Sequence[rpc.CloneSpec]) -> None:
    if group.snapshot.state != states.READY:
        raise Refused(
            "STATE_INVALID",
            f"group snapshot {group.id} is {states.name(group.snapshot.state)}, not READY",
            group_snapshot=group.id,
            state=states.name(group.snapshot.state),
        )
    for wanted in clones:
        pool = core.pools.get(wanted.source.pool)
        if not (await pool.ask(pool.provider.capabilities)).clone:
            raise Refused("CAPABILITY_MISSING", f"pool {pool.name} cannot clone", pool=pool.name, capability="clone")
        readable(core, group, wanted.source)
