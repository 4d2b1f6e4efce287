"""The gateway's configuration: a TOML file, checked whole before anything starts.

An error names the key at fault (``pools.fast.root``) and what is expected there. Unknown keys are errors: a
misspelt limit must not silently become the default.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import entry_points
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from providers.base import Provider

Right = Literal["read", "snapshot", "revert", "delete"]
PoolName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,63}$")]


class ConfigError(Exception):
    """The configuration cannot be used; the message names file, key and what is wrong."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tls(_Table):
    """TLS of the TCP listeners: PEM files. With `client_ca`, clients have to show a certificate (mTLS)."""

    cert: Path
    key: Path
    client_ca: Path | None = None


class Client(_Table):
    """Who may call over TCP, and what.

    Known by the common name or a DNS name of its certificate, or by a token of which only the SHA-256 is kept.
    """

    name: str
    certificate: str | None = None
    token_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    rights: frozenset[Right] = frozenset({"read"})
    pools: frozenset[PoolName] | None = None

    @model_validator(mode="after")
    def _known_by_something(self) -> Client:
        if (self.certificate is None) == (self.token_sha256 is None):
            raise ValueError("give either certificate or token_sha256")
        return self


class Limits(_Table):
    """Threads and deadlines. Threads are per pool and kind of work; times are in seconds."""

    threads: int = Field(default=8, ge=1, le=64)
    call_timeout_s: float = Field(default=30, gt=0, le=600)
    cut_timeout_s: float = Field(default=10, gt=0, le=600)
    settle_retry_s: float = Field(default=600, ge=0)
    drain_s: float = Field(default=30, ge=0, le=600)
    read_streams: int = Field(default=16, ge=1, le=256)
    nbd_connections: int = Field(default=128, ge=1, le=1024)


class Gateway(_Table):
    """Where the gateway listens and what it keeps."""

    listen: list[str] = ["unix:/run/frostgate/frostgate.sock"]
    journal: Path = Path("/var/lib/frostgate/journal.db")
    socket_mode: Annotated[str, StringConstraints(pattern=r"^0[0-7]{3}$")] = "0600"
    socket_group: str | None = None
    tls: Tls | None = None
    insecure_tcp: bool = False
    metrics: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    limits: Limits = Limits()

    @property
    def unix_socket(self) -> Path | None:
        """The first unix socket that is listened on, or None."""
        paths = (address.removeprefix("unix:") for address in self.listen if address.startswith("unix:"))
        return next(map(Path, paths), None)


class PoolConfig(BaseModel):
    """One pool: its provider's class and validated options."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    kind: str
    provider: type[Provider]
    options: BaseModel


class Config(_Table):
    """The whole configuration."""

    gateway: Gateway = Gateway()
    clients: list[Client] = []
    pools: dict[PoolName, PoolConfig]


class _File(_Table):
    gateway: Gateway = Gateway()
    clients: list[Client] = []
    pools: dict[PoolName, dict[str, object]] = {}


def load(path: Path) -> Config:
    """Read and check the configuration.

    Raises ConfigError naming the file, the key and the problem.
    """
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    try:
        file_config = _File.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(_explained(path, "", error)) from error
    if not file_config.pools:
        raise ConfigError(f"{path}: pools: no pool is configured; add a table such as [pools.fast] with kind and root")
    _check_listeners(path, file_config)
    pools = {name: _pool(path, name, dict(table)) for name, table in file_config.pools.items()}
    for client in file_config.clients:
        for unknown in (client.pools or frozenset()) - pools.keys():
            raise ConfigError(f"{path}: clients.{client.name}.pools: there is no pool {unknown!r}")
    return Config(gateway=file_config.gateway, clients=file_config.clients, pools=pools)


def is_loopback(address: str) -> bool:
    """Tell whether a "host:port" is one that only this machine can reach."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _check_listeners(path: Path, config: _File) -> None:
    gateway = config.gateway
    if not gateway.listen:
        raise ConfigError(f"{path}: gateway.listen: name at least one address")
    for address in gateway.listen:
        if address.startswith("unix:"):
            if not Path(address.removeprefix("unix:")).is_absolute():
                raise ConfigError(f"{path}: gateway.listen: {address!r}: the socket's path has to be absolute")
            continue
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"{path}: gateway.listen: {address!r} is neither unix:/path nor host:port")
        if gateway.insecure_tcp:
            continue
        if gateway.tls is None and not is_loopback(address):
            raise ConfigError(
                f"{path}: gateway.tls: {address} can be reached from other machines: set tls.cert and tls.key "
                "(and client_ca or clients with tokens), or insecure_tcp = true if you mean it"
            )
        if not config.clients:
            raise ConfigError(
                f"{path}: clients: nobody could use {address}: add [[clients]] with a certificate or token_sha256 "
                "and rights, or insecure_tcp = true to let everybody do everything"
            )


def _pool(path: Path, name: str, table: dict[str, object]) -> PoolConfig:
    kind = table.pop("kind", None)
    known = {entry.name: entry for entry in entry_points(group="frostgate.providers")}
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(f"{path}: pools.{name}.kind: {kind!r} is not one of {', '.join(sorted(known))}")
    try:
        provider: type[Provider] = known[kind].load()
    except ImportError as error:
        raise ConfigError(f"{path}: pools.{name}.kind: provider {kind} cannot be loaded: {error}") from error
    try:
        options = provider.Options.model_validate(table)
    except ValidationError as error:
        raise ConfigError(_explained(path, f"pools.{name}.", error)) from error
    return PoolConfig(kind=kind, provider=provider, options=options)


def _explained(path: Path, prefix: str, error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        key = prefix + ".".join(str(part) for part in problem["loc"])
        text = "is not a known key" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{path}: {key.rstrip('.')}: {text}")
    return "\n".join(lines)
