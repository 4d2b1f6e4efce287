"""Writing a member's bytes to a file or a pipe."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from clients.cli import tables
from clients.cli.session import REFUSED, Refusal
from frostgate.v1 import snapshot_provider_pb2 as rpc

_ZEROS = bytes(1024 * 1024)


def to_file(
    parts: Iterable[rpc.ReadBlocksResponse], path: Path, offset: int, total: int, *, replace: bool = False
) -> None:
    """Write parts to a sparse file, complete and durable or not at all: FILE.partial, fsync, rename.

    `offset` is that of the range, which the file begins with; `total` its bytes, for the progress.
    Raises Refusal when the file exists or cannot be written, GatewayError.
    """
    if path.exists() and not replace:
        raise Refusal(f"{path} exists; say --force to replace it", REFUSED)
    partial = path.with_name(path.name + ".partial")
    try:
        try:
            with partial.open("wb") as file, tables.progress() as bar:
                task = bar.add_task(f"reading {path.name}", total=total)
                end = 0
                for part in parts:
                    end = part.offset - offset + (len(part.data) or part.zero_bytes)
                    if part.data:
                        file.seek(part.offset - offset)
                        file.write(part.data)
                    bar.update(task, completed=end)
                file.truncate(end)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise Refusal(f"{error.filename or path}: {error.strerror}") from None


def to_stream(parts: Iterable[rpc.ReadBlocksResponse], stream: BinaryIO, total: int) -> None:
    """Write parts to a stream, holes as zeros."""
    with tables.progress() as bar:
        task = bar.add_task("reading", total=total)
        for part in parts:
            if part.data:
                stream.write(part.data)
            left = part.zero_bytes
            while left:
                left -= stream.write(_ZEROS[: min(left, len(_ZEROS))])
            bar.advance(task, len(part.data) or part.zero_bytes)
        stream.flush()
