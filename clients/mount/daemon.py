"""Mounting: from an empty directory to the kernel's mount, and back, whatever ends us.

Mounts are ro, nosuid, nodev and noexec. A member that is a raw file on this host is bound (mount --bind, read-only
too) over its place in disks/, when we are root: then the kernel reads it, at its own speed and with its holes.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyfuse3
import structlog
import trio

from clients.blocks import FileBlocks
from clients.files.snapshot import OpenSnapshot
from clients.mount.filesystem import SnapshotFilesystem
from clients.mount.tree import Directory
from clients.mount.waiting import waiting

FILESYSTEM_TYPE = "fuse.frostgate"
_READ_AHEAD_KIB = 1024
_log = structlog.get_logger()


class MountFailed(Exception):
    """A directory cannot be mounted or unmounted; the text says why."""


def serve(
    root: Directory,
    directory: Path,
    name: str,
    ready: Callable[[], None],
    *,
    allow_other: bool = False,
    bound: OpenSnapshot | None = None,
) -> None:
    """Mount, call `ready`, and serve until unmounted or told by SIGTERM or SIGINT; then unmount.

    `name` is shown as the mount's source. The members of `bound` that are local files are bound. Blocks.
    Raises MountFailed.
    """
    options = {
        "ro",
        "nosuid",
        "nodev",
        "noexec",
        "default_permissions",
        f"fsname=frostgate:{name}",
        "subtype=frostgate",
    }
    if allow_other:
        options.add("allow_other")
    # a disk and its parser have a few each, and --all has very many
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    filesystem = SnapshotFilesystem(root)
    waiting.install()
    try:
        pyfuse3.init(filesystem, str(directory), options)
    except RuntimeError as error:
        raise MountFailed(f"{directory} cannot be mounted ({error}); is /dev/fuse there?") from None
    mounted = True
    try:
        mounted = trio.run(_serve, filesystem, directory, bound, ready)
    finally:
        if mounted:
            unbind(directory)
        pyfuse3.close(unmount=mounted)
        if mounted and _is_mounted(directory):
            # somebody is in there; he sees errors from now on, and the mount goes when he does
            subprocess.run(["umount", "--lazy", directory], check=False)


async def _serve(
    filesystem: SnapshotFilesystem, directory: Path, bound: OpenSnapshot | None, ready: Callable[[], None]
) -> bool:
    """Return whether the mount is still there."""
    told = False
    async with trio.open_nursery() as nursery:

        async def stop_on_signal() -> None:
            nonlocal told
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                async for _ in signals:
                    told = True
                    nursery.cancel_scope.cancel()

        async def serve_requests() -> None:
            await pyfuse3.main(min_tasks=2, max_tasks=32)
            nursery.cancel_scope.cancel()

        nursery.start_soon(stop_on_signal)
        nursery.start_soon(serve_requests)
        nursery.start_soon(filesystem.ahead)
        if os.geteuid() == 0:
            await trio.to_thread.run_sync(_read_more_ahead, directory)
            if bound:
                await trio.to_thread.run_sync(_bind, directory, bound)
        ready()
        if bound:
            # the parsers start while nobody waits for them yet
            await trio.to_thread.run_sync(bound.trees, abandon_on_cancel=True)
    return told


def _read_more_ahead(directory: Path) -> None:
    """Have the kernel ask for a megabyte at once: FUSE's 128 KiB are for file systems that answer sooner."""
    device = os.stat(directory).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        setting.write_text(str(_READ_AHEAD_KIB))
    except OSError as error:
        # /sys is read-only in many containers
        _log.info("reads_stay_small", error=str(error))


def _bind(directory: Path, opened: OpenSnapshot) -> None:
    for name, disk in zip(opened.names, opened.disks, strict=True):
        if not isinstance(disk, FileBlocks):
            continue
        place = directory / "disks" / f"{name}.raw"
        source = f"/proc/{os.getpid()}/fd/{disk.descriptor()}"
        for command in (
            ["mount", "--bind", source, str(place)],
            ["mount", "-o", "remount,bind,ro,nosuid,nodev,noexec", str(place)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                # FUSE serves it as well, only slower
                _log.warning("not_bound", disk=name, error=done.stderr.strip())
                subprocess.run(["umount", place], capture_output=True, check=False)
                break


def unbind(directory: Path) -> None:
    """Take away what is mounted below a mount of ours; what is busy goes when it is not."""
    inner = [path for path in _mounted() if path != directory and path.is_relative_to(directory)]
    for path in sorted(inner, reverse=True):
        subprocess.run(["umount", "--lazy", path], capture_output=True, check=False)


def mounts() -> list[Path]:
    """Return where snapshots are mounted."""
    return [path for path, kind in _table() if kind == FILESYSTEM_TYPE]


def unmount(directory: Path, *, lazy: bool = False) -> None:
    """Unmount a directory, also one whose server was killed. Raises MountFailed when somebody is in there."""
    inner = [path for path in _mounted() if path != directory and path.is_relative_to(directory)]
    how = ["--lazy"] if lazy else []
    for path in (*sorted(inner, reverse=True), directory):
        done = subprocess.run(["umount", *how, path], capture_output=True, text=True, check=False)
        if done.returncode and os.geteuid() != 0:
            words = ["fusermount3", "-u", *(["-z"] if lazy else []), str(path)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            why = done.stderr.strip() or str(path)
            raise MountFailed(f"{why}: stop what uses it, or say --lazy" if "busy" in why else why)


def _is_mounted(directory: Path) -> bool:
    return directory in mounts()


def _mounted() -> list[Path]:
    return [path for path, _ in _table()]


def _table() -> list[tuple[Path, str]]:
    """Return mount points and types. Source: fstab(5), which writes space, tab, newline and backslash in octal."""
    table = []
    with suppress(FileNotFoundError):
        for line in Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines():
            _, where, kind, *_ = line.split(" ")
            for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                where = where.replace(octal, character)
            table.append((Path(where), kind))
    return table
