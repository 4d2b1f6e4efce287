"""The gateway as a process: opens journal, pools and listeners, resumes, serves, drains."""

from __future__ import annotations

import asyncio
import grp
import os
import resource
import signal
import socket
from importlib.metadata import version
from pathlib import Path

import grpc
import sdnotify
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from frostgate.v1 import snapshot_provider_pb2_grpc
from gateway import metrics, recovery
from gateway.auth import Authenticator
from gateway.calls import SERVICE, CallInterceptor
from gateway.config import Config, Gateway
from gateway.groups import Core
from gateway.journal import Journal
from gateway.nbd.exports import Exports
from gateway.nbd.server import NbdServer, socket_beside
from gateway.pools import Pools
from gateway.servicer import SnapshotProvider

log = structlog.get_logger()

_MAX_MESSAGE_BYTES = 8 * 1024 * 1024
_CALLS_GRACE_S = 10


class ListenError(Exception):
    """An address cannot be listened on; the message says which and why."""


async def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises JournalError, ListenError; OSError when the metrics' address is taken.
    """
    limits = config.gateway.limits
    _raise_file_limit()
    journal = Journal(config.gateway.journal)
    pools = Pools(config.pools, limits)
    core = Core(journal, pools, limits, nbd_socket=_nbd_socket(config.gateway))
    nbd_server: NbdServer | None = None
    health = HealthServicer()
    server = grpc.aio.server(
        interceptors=[CallInterceptor(Authenticator(config))],
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", 1024),
        ],
    )
    snapshot_provider_pb2_grpc.add_SnapshotProviderServicer_to_server(SnapshotProvider(core), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), server
    )
    if config.gateway.metrics:
        metrics.serve(config.gateway.metrics)
    try:
        await recovery.resume(core)
        for address in config.gateway.listen:
            _listen(server, address, config.gateway)
        await server.start()
        if core.nbd_socket:
            nbd_server = NbdServer(Exports(core), _bound(core.nbd_socket))
            nbd_server.start()
        _open_sockets(config.gateway)
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        await health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        sdnotify.SystemdNotifier().notify("READY=1")
        log.info("serving", version=version("frostgate"), listen=config.gateway.listen, pools=sorted(config.pools))
        await _stopped()
        log.info("draining", drain_s=limits.drain_s)
        sdnotify.SystemdNotifier().notify("STOPPING=1")
        await health.enter_graceful_shutdown()
        await server.stop(_CALLS_GRACE_S)
    finally:
        if nbd_server:
            nbd_server.close()
        await core.drain(limits.drain_s)
        journal.close()
        pools.close()
    log.info("stopped")


def _raise_file_limit() -> None:
    """Allow all the files that we may have: a reservation holds two a volume."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listen(server: grpc.aio.Server, address: str, gateway: Gateway) -> None:
    unix = address.startswith("unix:")
    if unix:
        Path(address.removeprefix("unix:")).parent.mkdir(parents=True, exist_ok=True)
    umask = os.umask(0o177)  # nobody gets in before _open_sockets() has set the rights
    try:
        if unix or gateway.tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, _credentials(gateway))
    except (RuntimeError, OSError) as error:
        raise ListenError(f"{address}: cannot listen: {error}") from error
    finally:
        os.umask(umask)
    if not unix and port == 0:
        raise ListenError(f"{address}: cannot listen")
    if not unix:
        log.info("listening", address=f"{address.rpartition(':')[0]}:{port}")


def _nbd_socket(gateway: Gateway) -> Path | None:
    return socket_beside(gateway.unix_socket) if gateway.unix_socket else None


def _bound(path: Path) -> socket.socket:
    """Return a socket bound to a path, as gRPC binds its own: whatever socket was there is replaced."""
    bound = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o177)  # see _listen()
    try:
        if path.is_socket():
            path.unlink()
        bound.bind(str(path))
    except OSError as error:
        bound.close()
        raise ListenError(f"{path}: cannot listen: {error}") from error
    finally:
        os.umask(umask)
    return bound


def _credentials(gateway: Gateway) -> grpc.ServerCredentials:
    tls = gateway.tls
    if tls is None:
        raise AssertionError("only called with TLS")
    try:
        pair = (tls.key.read_bytes(), tls.cert.read_bytes())
        ca = tls.client_ca.read_bytes() if tls.client_ca else None
    except OSError as error:
        raise ListenError(f"gateway.tls: {error.filename}: {error.strerror}") from error
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


def _open_sockets(gateway: Gateway) -> None:
    paths = [Path(address.removeprefix("unix:")) for address in gateway.listen if address.startswith("unix:")]
    if beside := _nbd_socket(gateway):
        paths.append(beside)
    for path in paths:
        if gateway.socket_group:
            try:
                group_id = grp.getgrnam(gateway.socket_group).gr_gid
            except KeyError:
                raise ListenError(f"gateway.socket_group: there is no group {gateway.socket_group!r}") from None
            os.chown(path, -1, group_id)
        path.chmod(int(gateway.socket_mode, 8))


async def _stopped() -> None:
    """Wait for SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
