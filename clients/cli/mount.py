"""`frostgate mount` and `frostgate umount`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Annotated

import structlog
import typer

from clients.cli.session import (
    FAILED,
    NOT_FOUND,
    REFUSED,
    USAGE,
    AddressOption,
    OutputOption,
    Refusal,
    command,
    print_json,
    session,
)
from clients.files.snapshot import OpenSnapshot
from clients.gateway import Gateway

_READY_FD = "FROSTGATE_MOUNT_READY_FD"

KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", metavar="FILE", help="The passphrase of LUKS volumes; a newline at its end is cut off."),
]


@command
def mount(
    target: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="The group snapshot; with --all, the directory.")],
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="An empty directory, made if need be; else ./SNAPSHOT.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every snapshot of every VM, found when looked at.")] = False,
    foreground: Annotated[bool, typer.Option("--foreground", "-f", help="Do not go into the background.")] = False,
    allow_other: Annotated[
        bool, typer.Option("--allow-other", help="Let other users in, by the files' modes.")
    ] = False,
    key_file: KeyFile = None,
    output: OutputOption = None,
    address: AddressOption = None,
) -> None:
    """Show a snapshot's disks and files as a read-only directory.

    disks/VOLUME.raw are the disks as raw bytes, whatever their format; files/VOLUME/PARTITION/ are the files in them.
    """
    if every and directory:
        raise Refusal("--all takes one argument, the directory", USAGE)
    where = Path(target if every else directory or target).absolute()
    _check_directory(where)
    if not foreground:
        _in_background(where, allow_other, every, target, key_file)
        return
    _mount(where, None if every else target, allow_other, passphrase(key_file))


@command
def umount(
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="What was mounted.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every snapshot that is mounted.")] = False,
    lazy: Annotated[bool, typer.Option("--lazy", help="Also when somebody is in there: it goes when he does.")] = False,
    output: OutputOption = None,
) -> None:
    """Unmount a snapshot, also when what served it was killed."""
    daemon = _daemon()
    mounted = daemon.mounts()
    if every == bool(directory):
        raise Refusal("name the directory, or say --all", USAGE)
    chosen = mounted if every else [Path(directory or "").absolute()]
    if not every and chosen[0] not in mounted:
        there = ", ".join(map(str, mounted)) or "none is"
        raise Refusal(f"{chosen[0]} is no mounted snapshot; mounted: {there}", NOT_FOUND)
    for path in chosen:
        try:
            daemon.unmount(path, lazy=lazy)
        except daemon.MountFailed as error:
            raise Refusal(str(error), REFUSED) from None
    if session.json:
        print_json({"unmounted": [str(path) for path in chosen]})


def passphrase(key_file: Path | None) -> str | None:
    """Return a key file's content. Raises Refusal."""
    if key_file is None:
        return None
    try:
        return key_file.read_text().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{key_file}: {error}", USAGE) from None


def _mount(where: Path, snapshot_id: str | None, allow_other: bool, key: str | None) -> None:
    daemon = _daemon()
    from clients.mount.tree import Everything, snapshot_directory

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    with session.gateway() as gateway:
        _check_gateway(gateway)
        try:
            if snapshot_id is None:
                everything = Everything(gateway, key)
                try:
                    daemon.serve(everything.root(), where, "all", lambda: _ready(where), allow_other=allow_other)
                finally:
                    everything.close()
                return
            with OpenSnapshot(gateway, snapshot_id, key) as opened:
                daemon.serve(
                    snapshot_directory(opened),
                    where,
                    snapshot_id,
                    lambda: _ready(where),
                    allow_other=allow_other,
                    bound=opened,
                )
        except daemon.MountFailed as error:
            raise Refusal(str(error), FAILED) from None


def _check_gateway(gateway: Gateway) -> None:
    """Raise GatewayError when nobody answers: better now than in the first `ls`."""
    next(gateway.list(), None)


def _ready(where: Path) -> None:
    """Tell whoever waits: systemd, and the process that started us into the background."""
    import sdnotify

    sdnotify.SystemdNotifier().notify("READY=1")
    waiting = os.environ.get(_READY_FD)
    if waiting:
        with os.fdopen(int(waiting), "w") as pipe:
            pipe.write("ready\n")
    elif session.json:
        print_json({"mounted": str(where)})
    else:
        print(f"mounted at {where}; Ctrl-C unmounts", flush=True)


def _in_background(where: Path, allow_other: bool, every: bool, target: str, key_file: Path | None) -> None:
    """Start ourselves in a session of its own, and wait until it is mounted or has said why not."""
    read, write = os.pipe()
    log = tempfile.NamedTemporaryFile(prefix="frostgate-mount-", suffix=".log", delete=False)  # noqa: SIM115
    words = [sys.executable, "-m", "clients.cli.main", *_connection(), "mount", "--foreground"]
    words += ["--allow-other"] if allow_other else []
    words += ["--key-file", str(key_file.absolute())] if key_file else []
    words += ["--all", str(where)] if every else [target, str(where)]
    with log:
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(write,),
            start_new_session=True,
            cwd="/",
            env={**os.environ, _READY_FD: str(write), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    os.close(write)
    with os.fdopen(read) as pipe:
        ready = pipe.read() == "ready\n"
    if not ready:
        code = child.wait()
        said = Path(log.name).read_text(errors="replace").strip()
        Path(log.name).unlink()
        raise Refusal(said.removeprefix("error: ") or f"the mount ended with code {code}", code if code > 0 else FAILED)
    if session.json:
        print_json({"mounted": str(where), "pid": child.pid, "log": log.name})
    else:
        print(f"mounted at {where} by process {child.pid}, log {log.name}; `frostgate umount {where}` ends it")


def _connection() -> list[str]:
    """Return our own connection's options."""
    words = ["--address", session.address]
    for option, value in (
        ("--ca", session.ca),
        ("--cert", session.cert),
        ("--key", session.key),
        ("--token-file", session.token_file),
    ):
        words += [option, str(value.absolute())] if value else []
    return words


def _check_directory(where: Path) -> None:
    try:
        where.mkdir(parents=True, exist_ok=True)
        if any(where.iterdir()):
            raise Refusal(f"{where} is not empty", REFUSED)
    except OSError as error:
        hint = "; a mount whose server was killed? See `frostgate umount`" if error.errno == 107 else ""
        raise Refusal(f"{where}: {error.strerror}{hint}", REFUSED) from None


def _daemon() -> ModuleType:
    """Load what needs pyfuse3. Raises Refusal."""
    try:
        from clients.mount import daemon
    except ImportError as error:
        raise Refusal(f"{error}: install frostgate[mount] (Debian: libfuse3-dev and fuse3 first)", FAILED) from None
    return daemon
