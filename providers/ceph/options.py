"""A ceph pool's keys in the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

_Name = Annotated[str, StringConstraints(pattern=r"^[^/@\x00-\x1f\x7f]{1,128}$")]


class CephOptions(BaseModel):
    """Where the images lie and as whom to look at them.

    `conf` or `monitors` names the cluster, `user` is without "client.". `cut` is how a group snapshot is made:
    "group" by one RBD group snapshot (atomic, but Ceph before 20 can neither clone from it nor name it in a diff),
    "parallel" by one snapshot an image at the same time (atomic only because the guest is frozen; reverts and
    clones are instant). `commit_interval_s` is the monitors' paxos_propose_interval: prepare waits until two
    of them have passed since our last change to the OSD map, so that the cut need not. `timeout_s` bounds every
    operation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rbd_pool: _Name
    namespace: Annotated[str, StringConstraints(pattern=r"^[^/@\x00-\x1f\x7f]{0,128}$")] = ""
    user: _Name = "frostgate"
    keyring: Path | None = None
    conf: Path | None = None
    monitors: tuple[Annotated[str, StringConstraints(pattern=r"^[^\s,]{1,262}$")], ...] = ()
    cut: Literal["group", "parallel"] = "group"
    commit_interval_s: float = Field(default=1.0, ge=0, le=10)
    timeout_s: int = Field(default=30, ge=1, le=600)

    @model_validator(mode="after")
    def _knows_the_cluster(self) -> CephOptions:
        if self.conf is None and not self.monitors:
            raise ValueError("give conf (such as /etc/ceph/ceph.conf) or monitors")
        return self
