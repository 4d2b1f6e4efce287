"""The listening socket and a thread per connection.

The socket lies beside the gateway's own unix socket and has its mode and group: who may call the gateway there may
read here. A connection's thread may hang with its storage; it holds nobody else's.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import structlog

from frostgate.v1 import volume_pb2
from gateway.nbd.exports import Exports, name_of
from gateway.nbd.negotiation import Negotiation
from gateway.nbd.protocol import Violation
from gateway.nbd.stream import Gone, set_timeouts
from gateway.nbd.transmission import READER_IDLE_S, SEND_S, transmit

NEGOTIATION_S = 10
_MOST_NEGOTIATING = 64
_BACKLOG = 64

log = structlog.get_logger()


def socket_beside(path: Path) -> Path:
    """Return where the exports are for a gateway that listens on a unix socket: x.sock has x.nbd.sock."""
    return path.with_suffix(f".nbd{path.suffix}")


def uri(path: Path, group_id: str, volume: volume_pb2.VolumeRef) -> str:
    """Return a member's address. Source: NetworkBlockDevice/nbd, doc/uri.md."""
    return f"nbd+unix:///{quote(name_of(group_id, volume))}?socket={quote(str(path))}"


class NbdServer:
    """Serves exports on a unix socket from start() to close()."""

    def __init__(self, exports: Exports, listening: socket.socket) -> None:
        """Take a bound socket; its file's mode is the caller's matter."""
        self._exports = exports
        self._listening = listening
        self._stopping = threading.Event()
        self._negotiating = threading.BoundedSemaphore(_MOST_NEGOTIATING)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Take connections."""
        self._listening.listen(_BACKLOG)
        threading.Thread(target=self._accept, name="nbd-accept", daemon=True).start()

    def close(self) -> None:
        """Take no more, and end every connection; what hangs in a storage is left to the end of the process."""
        self._stopping.set()
        with suppress(OSError):  # it was never started
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._lock:
            open_now = list(self._open)
        for connection in open_now:
            self._hang_up(connection)

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                log.warning("nbd accept failed", error=str(error))
                self._stopping.wait(1)
                continue
            if not self._negotiating.acquire(blocking=False):
                log.warning("nbd connection refused", why="too many that do not say what they want")
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="nbd", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.add(connection)
        try:
            self._converse(connection)
        except Gone as error:
            log.debug("nbd connection ended", why=str(error))
        except (Violation, TimeoutError) as error:
            log.info("nbd connection ended", why=str(error) or "it says nothing")
        except Exception:  # the thread's edge
            log.exception("fault")
        finally:
            with self._lock:
                self._open.discard(connection)
                connection.close()

    def _converse(self, connection: socket.socket) -> None:
        try:
            set_timeouts(connection, NEGOTIATION_S, NEGOTIATION_S)
            agreed = Negotiation(connection, self._exports, lambda: self._hang_up(connection)).run()
        finally:
            self._negotiating.release()
        if agreed is None:
            return
        try:
            set_timeouts(connection, READER_IDLE_S, SEND_S)
            transmit(connection, agreed, self._stopping.is_set)
        finally:
            agreed.export.close()

    def _hang_up(self, connection: socket.socket) -> None:
        """End a connection from outside its thread, whose next call on it fails."""
        # under the lock: its descriptor must not become another file's meanwhile
        with self._lock, suppress(OSError):
            if connection in self._open:
                connection.shutdown(socket.SHUT_RDWR)
