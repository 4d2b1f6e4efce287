"""Reading on while the gateway is away: again and again until GIVE_UP_S have passed, then EIO and a line in the log."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

import grpc
import structlog

from clients.gateway import GatewayError

GIVE_UP_S = 30.0
T = TypeVar("T")
_log = structlog.get_logger()


class Away(Exception):
    """The gateway or the storage does not answer now. The text says more."""


def answered(question: Callable[[], T]) -> T:
    """Return the gateway's answer on a snapshot that was READY. Raises Away, OSError ESTALE when it is gone, or EIO."""
    try:
        return question()
    except GatewayError as error:
        if error.status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
            raise Away(str(error)) from error
        gone = error.status == grpc.StatusCode.NOT_FOUND or error.reason == "STATE_INVALID"
        raise OSError(errno.ESTALE if gone else errno.EIO, str(error)) from error


def patiently(read: Callable[[], T], snapshot_id: str = "", volume: str = "") -> T:
    """Return what `read` returns, called again while it raises Away. The names are for the log.

    Raises OSError EIO when it stays away; what else it raises passes, after a line in the log.
    """
    deadline = time.monotonic() + GIVE_UP_S
    pause_s = 0.1
    while True:
        try:
            return read()
        except Away as away:
            if time.monotonic() + pause_s > deadline:
                _log.error("read_failed", group_snapshot=snapshot_id, volume=volume, error=str(away))
                raise OSError(errno.EIO, str(away)) from away
            _log.warning("read_retried", group_snapshot=snapshot_id, volume=volume, error=str(away))
            time.sleep(pause_s)
            pause_s = min(2.0, pause_s * 2)
        except OSError as error:
            _log.error("read_failed", group_snapshot=snapshot_id, volume=volume, error=str(error))
            raise
