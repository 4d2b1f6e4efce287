"""A storpool pool's keys in the configuration, and what StorPool's own configuration says where they are silent.

Most of what is needed to talk to a cluster is on every StorPool host already: /etc/storpool.conf, with a section a
host, and the environment. A key given here wins over the environment, the environment over the file.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, model_validator
from storpool.spconfig import SPConfig, SPConfigException

from providers.base import PoolUnavailable

_PARSING = threading.Lock()
"""The parser of StorPool's files cannot be used by two threads at once."""

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_\-]{1,199}$")]


class StorPoolOptions(BaseModel):
    """Which volumes are the pool, and where the cluster's API is.

    `template` is what new volumes are made with; its volumes are the pool, unless `name_prefix` or `tag` ("key=value")
    says which are. `client_id` is the StorPool client on this host, on which snapshots are attached to be read; the
    device nodes are in `devices_by_id`, and the paths by which hypervisors name volumes in `device_directories`.
    `force_detach` lets a revert detach volumes that a client has attached; they are attached again afterwards.
    `timeout_s` bounds a call of the API, `cut_timeout_s` the one inside the freeze window, and `retry_s` how long a
    call that the API calls transiently failed is repeated outside it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: _Name
    name_prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_\-.:]{1,100}$")] | None = None
    tag: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_\-.:]{1,60}=[A-Za-z0-9_\-.:]{1,60}$")] | None = None
    api_host: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:\-]{1,253}$")] | None = None
    api_port: int | None = Field(default=None, ge=1, le=65535)
    token: SecretStr | None = None
    token_file: Path | None = None
    conf: Path = Path("/etc/storpool.conf")
    conf_section: str | None = None
    client_id: int | None = Field(default=None, ge=1, le=4095)
    multi_cluster: bool = False
    force_detach: bool = False
    devices_by_id: Path = Path("/dev/storpool-byid")
    device_directories: tuple[Path, ...] = (Path("/dev/storpool"),)
    timeout_s: float = Field(default=30, ge=0.1, le=600)
    cut_timeout_s: float = Field(default=8, ge=0.1, le=60)
    retry_s: float = Field(default=10, ge=0, le=600)

    @model_validator(mode="after")
    def _is_unambiguous(self) -> StorPoolOptions:
        if self.token is not None and self.token_file is not None:
            raise ValueError("give token or token_file, not both")
        if self.name_prefix is not None and self.tag is not None:
            raise ValueError("give name_prefix or tag, not both")
        return self


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the API is. The token is never shown."""

    host: str
    port: int
    token: SecretStr
    client_id: int | None


def connection(options: StorPoolOptions) -> Connection:
    """Return what to connect to, from the options, the environment and StorPool's files.

    Raises PoolUnavailable when a file cannot be read or makes no sense: it may be put right without a restart.
    """
    files = type("_Files", (SPConfig,), {"PATH_CONFIG": str(options.conf), "PATH_CONFIG_DIR": f"{options.conf}.d"})
    try:
        with _PARSING:
            found = files(section=options.conf_section, missing_ok=True)
        token = options.token
        if options.token_file is not None:
            token = SecretStr(options.token_file.read_text().strip())
        ours = found.get("SP_OURID")
        return Connection(
            host=options.api_host or found["SP_API_HTTP_HOST"],
            port=options.api_port or int(found["SP_API_HTTP_PORT"]),
            token=token or SecretStr(found.get("SP_AUTH_TOKEN", "")),
            client_id=options.client_id or (int(ours) if ours else None),
        )
    except OSError as error:
        raise PoolUnavailable(f"token_file {error.filename} cannot be read: {error.strerror}") from error
    except SPConfigException as error:
        raise PoolUnavailable(str(error)) from error
    except ValueError as error:
        raise PoolUnavailable(f"{options.conf}: SP_API_HTTP_PORT or SP_OURID is not a number") from error
