"""The keys of an nfs pool in the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from providers.nfs.images import Format


def _absolute(path: Path) -> Path:
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError("has to be an absolute path without '..'")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
HostName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,255}$")]


class NfsOptions(BaseModel):
    """`root`: where this host sees the directory. `hypervisor_paths`: other paths under which hypervisors do.

    `hypervisors`: libvirt's URI of each host, by its name, that may be asked to cut the volumes of its running VMs.
    `max_incrementals`: how many snapshots may lie on one another before everything is copied again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: AbsolutePath
    hypervisor_paths: tuple[AbsolutePath, ...] = ()
    default_format: Format = "raw"
    hypervisors: dict[HostName, str] = {}
    max_incrementals: Annotated[int, Field(ge=0, le=30)] = 16
