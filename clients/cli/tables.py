"""What people see: tables on a terminal, plain columns in a pipe, sizes and times in words, progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC

from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from clients.cli.session import printable
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import volume_pb2

_PIPE_WIDTH = 10_000
_COLOURS = {"READY": "green", "FAILED": "red", "HEALTHY": "green", "UNAVAILABLE": "red", "yes": "yellow"}


def show(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; on a pipe without colours, boxes and cut-off names."""
    terminal = sys.stdout.isatty()
    table = Table(box=None, pad_edge=False, header_style="bold" if terminal else "")
    for column in columns:
        table.add_column(column, overflow="fold" if terminal else "ignore", no_wrap=not terminal)
    for row in rows:
        table.add_row(*(Text(printable(cell), style=_COLOURS.get(cell, "")) for cell in row))
    console = Console(width=None if terminal else _PIPE_WIDTH)
    if terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table, crop=False)
    for line in capture.get().splitlines():
        print(line.rstrip())


def fields(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one a line."""
    pairs = [pair for pair in pairs if pair[1]]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        print(f"{name:<{width}}  {printable(value)}")


def size(count: int) -> str:
    """Return bytes in words."""
    return str(decimal(count))


def time(timestamp: Timestamp) -> str:
    """Return a time in the local zone, to the second; "" when it is not set."""
    if not timestamp.seconds:
        return ""
    return timestamp.ToDatetime(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def state(snapshot: pb.GroupSnapshot) -> str:
    """Return "READY"."""
    return pb.GroupSnapshotState.Name(snapshot.state).removeprefix("GROUP_SNAPSHOT_STATE_")


def consistency(snapshot: pb.GroupSnapshot) -> str:
    """Return "FILESYSTEM"."""
    return pb.Consistency.Name(snapshot.consistency).removeprefix("CONSISTENCY_")


def ref(volume: volume_pb2.VolumeRef) -> str:
    """Return "pool/volume"."""
    return f"{volume.pool}/{volume.volume}"


def snapshots(found: Iterable[pb.GroupSnapshot]) -> None:
    """Print group snapshots, one a line."""
    show(
        ("ID", "STATE", "CONSISTENCY", "CUT", "MEMBERS", "VM"),
        (
            (
                snapshot.id,
                state(snapshot),
                consistency(snapshot),
                time(snapshot.cut_time),
                str(len(snapshot.members)),
                snapshot.vm.name,
            )
            for snapshot in found
        ),
    )


def snapshot(found: pb.GroupSnapshot) -> None:
    """Print one group snapshot with all that is known of it."""
    revert = found.revert
    fields(
        [
            ("id", found.id),
            ("state", state(found)),
            ("failure", f"{found.failure.reason}: {found.failure.message}" if found.failure.reason else ""),
            ("consistency", consistency(found)),
            ("cut", time(found.cut_time)),
            ("cut took", f"{found.cut_duration.ToNanoseconds() / 1e6:.1f} ms" if found.HasField("cut_time") else ""),
            ("ready", time(found.ready_time)),
            ("expires", time(found.expire_time)),
            ("vm", f"{found.vm.name} ({found.vm.uuid})" if found.HasField("vm") else ""),
            ("parent", found.vm.parent_id),
            ("current", "yes" if found.vm.current else ""),
            ("labels", ", ".join(f"{key}={value}" for key, value in sorted(found.labels.items()))),
            ("last revert", pb.Revert.State.Name(revert.state).removeprefix("STATE_") if revert.state else ""),
            ("state before it", revert.safety_id),
            ("revert failed", revert.failure.message),
        ]
    )
    print()
    show(
        ("MEMBER", "SIZE", "FORMAT", "MODE", "FILE"),
        ((ref(m.volume), size(m.size_bytes), m.format, m.mode, m.local_path) for m in found.members),
    )


def follow(changes: Iterable[pb.GroupSnapshot], doing: str) -> pb.GroupSnapshot | None:
    """Show progress on stderr (on a terminal) until the changes end; return the last state seen."""
    last = None
    with progress() as bar:
        task = bar.add_task(doing, total=None)
        for last in changes:
            work = last.progress
            bar.update(task, total=work.total_bytes or None, completed=work.done_bytes)
    return last


def progress() -> Progress:
    """Return a progress bar of bytes, with rate and time left, on stderr; it shows only on a terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
