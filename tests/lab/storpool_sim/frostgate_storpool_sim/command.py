"""`frostgate-storpool-sim`: a StorPool cluster to try Frostgate with, in the foreground until Ctrl-C or SIGTERM."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import resource
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyfuse3
import structlog
import trio
import typer

from frostgate_storpool_sim import devices as attached
from frostgate_storpool_sim.cluster import Cluster, Settings
from frostgate_storpool_sim.clusters import Clusters
from frostgate_storpool_sim.devices import Devices
from frostgate_storpool_sim.filesystem import DeviceFiles
from frostgate_storpool_sim.reclaim import Reclaimer
from frostgate_storpool_sim.server import Api, Server

_CLUSTER_ID = re.compile(r"[a-z0-9]+\.[a-z0-9]+")
_GIB = 1 << 30
_POOL = """
# for frostgate.toml
[pools.storpool]
kind = "storpool"
template = "{template}"
conf = "{directory}/storpool.conf"
devices_by_id = "{directory}/dev/storpool-byid"
device_directories = ["{directory}/dev/storpool"]
"""


@dataclass(frozen=True)
class Options:
    """How one simulator runs."""

    directory: Path
    host: str
    port: int
    token: str
    settings: tuple[Settings, ...]
    loop: bool
    latency_s: float
    admin: bool
    verbose: bool


main = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@main.command()
def run(
    directory: Annotated[Path, typer.Option(help="Where everything is kept; made when missing.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT of the API; port 0 takes a free one.")] = "127.0.0.1:8181",
    token: Annotated[str, typer.Option(help="The API's token. Without one: that of before, or a new one.")] = "",
    token_file: Annotated[Path | None, typer.Option(help="A file with the token.")] = None,
    cluster: Annotated[str, typer.Option(help="The cluster's name.")] = "sim",
    cluster_id: Annotated[str, typer.Option(help="Its id, with which global ids begin.")] = "sim.b",
    other_cluster: Annotated[list[str] | None, typer.Option(help="NAME=ID of another cluster that it knows.")] = None,
    client: Annotated[int, typer.Option(help="This host's client id (SP_OURID).", min=1, max=4095)] = 1,
    other_client: Annotated[list[int] | None, typer.Option(help="Other clients; may be repeated.")] = None,
    template: Annotated[str, typer.Option(help="A volume template that is there from the beginning.")] = "default",
    capacity_gib: Annotated[int, typer.Option(help="How much the cluster can hold.", min=1)] = 1024,
    deletion_s: Annotated[float, typer.Option(help="How long deleted snapshots stay listed as such.", min=0)] = 0.0,
    latency_ms: Annotated[float, typer.Option(help="Waited before every call.", min=0)] = 0.0,
    loop: Annotated[bool, typer.Option("--loop", help="Attach as loop devices (root), not as files.")] = False,
    admin: Annotated[bool, typer.Option("--admin", help="Let tests inject faults below /admin.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every call to stderr.")] = False,
) -> None:
    """Serve StorPool's management API over HTTP, with real copy-on-write volumes and snapshots behind it.

    Volumes that are attached to --client are files (with --loop: block devices) DIRECTORY/dev/storpool/NAME and
    DIRECTORY/dev/storpool-byid/GLOBALID. Everything survives a restart with the same --directory. Prints what to put
    into the environment or /etc/storpool.conf, and a pool for Frostgate's configuration.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise typer.BadParameter(f"{listen!r} is not HOST:PORT, such as 127.0.0.1:8181", param_hint="--listen")
    names = {cluster: cluster_id, **dict(_other_cluster(other) for other in other_cluster or ())}
    for found in names.values():
        if not _CLUSTER_ID.fullmatch(found):
            raise typer.BadParameter(f"{found!r} is not LOCATION.ID, such as sim.b", param_hint="--cluster-id")
    if loop and os.geteuid() != 0:
        raise typer.BadParameter("loop devices need root; leave it out to have files", param_hint="--loop")
    clients = tuple(sorted({client, *(other_client or [2, 3])}))
    settings = tuple(
        Settings(
            name,
            found,
            clients,
            client,
            template,
            capacity_gib * _GIB,
            deletion_s,
            tuple((other, its_id) for other, its_id in names.items() if other != name),
        )
        for name, found in names.items()
    )
    failed: list[BaseException] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory = directory.resolve()
        with _alone(directory):
            secret = _token(directory, token, token_file)
            serve(Options(directory, host, int(port), secret, settings, loop, latency_ms / 1000, admin, verbose))
    except* OSError as errors:
        failed = list(_leaves(errors))
    for error in failed:
        print(f"frostgate-storpool-sim: {error}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def serve(options: Options) -> None:
    """Run until SIGINT or SIGTERM; no mount and no loop device is left. Raises OSError."""
    _allow_open_files()
    (options.directory / "storpool.conf").unlink(missing_ok=True)
    attached.clear(options.directory)
    devices = Devices(options.directory, loop=options.loop)
    clusters = Clusters([Cluster(options.directory / f"cluster.{s.cluster_id}", s, devices) for s in options.settings])
    for cluster in clusters.all:
        cluster.show_devices()
    api = Api(clusters, options.token, latency_s=options.latency_s, admin=options.admin)
    server = _bound(options, api)
    _log_to_stderr(options.verbose)
    devices.images.mkdir(exist_ok=True)
    mount_options = {"fsname=storpool-sim", "subtype=storpool-sim", *(["allow_other"] if os.geteuid() == 0 else [])}
    pyfuse3.init(DeviceFiles(devices, clusters.of), str(devices.images), mount_options)
    reclaimer = Reclaimer(clusters.all)
    try:
        trio.run(_serve, options, devices, server, reclaimer)
    finally:
        (options.directory / "storpool.conf").unlink(missing_ok=True)
        pyfuse3.close(unmount=True)
        reclaimer.stop()
        for cluster in clusters.all:
            cluster.close()


async def _serve(options: Options, devices: Devices, server: Server, reclaimer: Reclaimer) -> None:
    token, asked_to_stop = trio.lowlevel.current_trio_token(), trio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        # not trio's receiver, which delivers anew what comes while all is taken down, and so kills us before it is
        signal.signal(number, lambda _number, _frame: token.run_sync_soon(asked_to_stop.set))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_answer_kernel, nursery.cancel_scope)
        try:
            await trio.to_thread.run_sync(devices.begin)
            server.start()
            reclaimer.start()
            _announce(options, server.server_address[1])
            await asked_to_stop.wait()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(server.stop)
                await trio.to_thread.run_sync(devices.end)
        nursery.cancel_scope.cancel()


async def _answer_kernel(whole: trio.CancelScope) -> None:
    """Until somebody unmounts, which ends everything."""
    await pyfuse3.main()
    whole.cancel()


def _other_cluster(given: str) -> tuple[str, str]:
    name, found, cluster_id = given.partition("=")
    if not name or not found:
        raise typer.BadParameter(f"{given!r} is not NAME=ID, such as backup=sim.c", param_hint="--other-cluster")
    return name, cluster_id


def _leaves(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Raises OSError when another simulator has the directory."""
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another simulator runs in {directory}: stop it, or take another --directory") from None
        yield


def _token(directory: Path, given: str, file: Path | None) -> str:
    if given and file:
        raise typer.BadParameter("either --token or --token-file", param_hint="--token")
    kept = directory / "token"
    if file is not None:
        given = file.read_text().strip()
    if not given:
        given = kept.read_text().strip() if kept.exists() else str(secrets.randbelow(10**19))
    kept.touch(0o600)
    kept.write_text(f"{given}\n")
    return given


def _bound(options: Options, api: Api) -> Server:
    try:
        return Server((options.host, options.port), api)
    except OSError as error:
        where = f"{options.host}:{options.port}"
        raise OSError(f"cannot listen on {where} ({error.strerror}): choose another address with --listen") from None


def _announce(options: Options, port: Any) -> None:
    """Write storpool.conf, whose being there says that all is ready, and say what to do."""
    conf = options.directory / "storpool.conf"
    new = conf.with_suffix(".new")
    lines = [
        f"SP_API_HTTP_HOST={options.host}",
        f"SP_API_HTTP_PORT={port}",
        f"SP_AUTH_TOKEN={options.token}",
    ]
    new.unlink(missing_ok=True)
    new.touch(0o600)
    new.write_text("\n".join([*lines, f"SP_OURID={options.settings[0].client}", ""]))
    new.rename(conf)
    exports = "".join(f"export {line}\n" for line in lines)
    print(exports + _POOL.format(template=options.settings[0].template, directory=options.directory), flush=True)


def _log_to_stderr(verbose: bool) -> None:
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _allow_open_files() -> None:
    """Every layer has two files open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
