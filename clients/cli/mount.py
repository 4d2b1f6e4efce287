"""`frostgate mount` and `frostgate umount`."""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Annotated, NoReturn

import sdnotify
import typer

from clients.cli.session import (
    FAILED,
    NOT_FOUND,
    OK,
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

_READY = "ready\n"

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
    where = Path(target if every else directory or target).resolve()
    key = passphrase(key_file)
    made = _check_directory(where)
    ready = (lambda: _say_ready(where)) if foreground else _in_background(where)
    try:
        _mount(where, None if every else target, allow_other, key, ready)
    except BaseException:
        if made:
            with suppress(OSError):  # somebody uses it by now
                where.rmdir()
        raise


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
    chosen = mounted if every else [Path(directory or "").resolve()]
    if not every and chosen[0] not in mounted:
        there = ", ".join(map(str, mounted)) or "none is"
        raise Refusal(f"{chosen[0]} is no mounted snapshot; mounted: {there}", NOT_FOUND)
    failed = {}
    for path in chosen:
        try:
            daemon.unmount(path, lazy=lazy)
        except daemon.MountFailed as error:
            failed[path] = str(error)
    if session.json:
        print_json({"unmounted": [str(path) for path in chosen if path not in failed]})
    if failed:
        raise Refusal("; ".join(failed.values()), REFUSED)


def passphrase(key_file: Path | None) -> str | None:
    """Return a key file's content. Raises Refusal."""
    if key_file is None:
        return None
    try:
        return key_file.read_text().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{key_file}: {error}", USAGE) from None


def _mount(where: Path, snapshot_id: str | None, allow_other: bool, key: str | None, ready: Callable[[], None]) -> None:
    daemon = _daemon()
    from clients.mount.tree import Everything, snapshot_directory

    with session.gateway() as gateway:
        _check_gateway(gateway)
        try:
            if snapshot_id is None:
                everything = Everything(gateway, key)
                try:
                    daemon.serve(everything.root(), where, "all", ready, allow_other=allow_other)
                finally:
                    everything.close()
                return
            with OpenSnapshot(gateway, snapshot_id, key) as opened:
                root = snapshot_directory(opened)
                daemon.serve(root, where, snapshot_id, ready, allow_other=allow_other, bound=opened)
        except daemon.MountFailed as error:
            raise Refusal(str(error), FAILED) from None


def _check_gateway(gateway: Gateway) -> None:
    """Raise GatewayError when nobody answers: better now than in the first `ls`."""
    next(gateway.list(), None)


def _say_ready(where: Path) -> None:
    """Tell whoever waits: systemd, and the user."""
    sdnotify.SystemdNotifier().notify("READY=1")
    if session.json:
        print_json({"mounted": str(where)})
    else:
        print(f"mounted at {where}; Ctrl-C unmounts", flush=True)


def _in_background(where: Path) -> Callable[[], None]:
    """Go on in a process in a session of its own, whose output goes to a log; return there what to call when mounted.

    We ourselves stay until then, and end with its exit code and words when it fails before. Done before anything is
    connected or started: of a process with threads, fork(2) takes only one.
    """
    _daemon()
    read, write = os.pipe()
    log = tempfile.NamedTemporaryFile(prefix="frostgate-mount-", suffix=".log", delete=False)  # noqa: SIM115
    child = os.fork()
    if child:
        os.close(write)
        _wait_for(child, read, where, Path(log.name))
    os.close(read)
    os.setsid()
    atexit.register(_remove_empty, Path(log.name))
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())

    def ready() -> None:
        os.chdir("/")
        sdnotify.SystemdNotifier().notify("READY=1")
        with os.fdopen(write, "w") as pipe:
            pipe.write(_READY)

    return ready


def _remove_empty(log: Path) -> None:
    """Remove the log of a mount that had nothing to say."""
    with suppress(OSError):
        if not log.stat().st_size:
            log.unlink()


def _wait_for(child: int, read: int, where: Path, log: Path) -> NoReturn:
    """Wait until a process has mounted or has ended, say so, and end. Raises Refusal, Exit."""
    with os.fdopen(read) as pipe:
        ready = pipe.read() == _READY
    if not ready:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        words = log.read_text(errors="replace").strip() if log.exists() else ""
        print(words or f"error: the mount ended with code {code}", file=sys.stderr)
        log.unlink(missing_ok=True)
        raise typer.Exit(code if code > 0 else FAILED)
    if session.json:
        print_json({"mounted": str(where), "pid": child, "log": str(log)})
    else:
        print(f"mounted at {where} by process {child}, log {log}; `frostgate umount {where}` ends it")
    raise typer.Exit(OK)


def _check_directory(where: Path) -> bool:
    """Make a directory if need be; return whether it was. Raises Refusal."""
    try:
        made = not where.exists()
        where.mkdir(parents=True, exist_ok=True)
        if any(where.iterdir()):
            raise Refusal(f"{where} is not empty", REFUSED)
    except OSError as error:
        hint = "; a mount whose server was killed? See `frostgate umount`" if error.errno == 107 else ""
        raise Refusal(f"{where}: {error.strerror}{hint}", REFUSED) from None
    return made


def _daemon() -> ModuleType:
    """Load what needs pyfuse3. Raises Refusal."""
    try:
        from clients.mount import daemon
    except ImportError as error:
        raise Refusal(f"{error}: install frostgate[mount] (Debian: libfuse3-dev and fuse3 first)", FAILED) from None
    return daemon
