"""The connection to one cluster and the translation of its errors.

librados finds its way back by itself after monitors and OSDs were away; only a client that the cluster has
blocklisted has to connect anew. Every operation ends after `timeout_s` (rados_osd_op_timeout,
rados_mon_op_timeout), so that an outage costs a thread for that long and no longer.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import rados
import rbd

from providers.base import PoolFull, PoolUnavailable, ProviderError, Space
from providers.ceph.options import CephOptions

_CONNECT_TIMEOUT_S = 5
_FAILED_FOR_S = 1.0
_MONITORS_FOR_S = 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EPERM, errno.EACCES)


class Cluster:
    """One pool's connection, made when it is first needed. Thread-safe."""

    def __init__(self, pool: str, options: CephOptions) -> None:
        """Take the Frostgate pool's name, for messages, and its options; nothing is opened yet."""
        self._pool = pool
        self._options = options
        self._lock = threading.Lock()
        self._connection: Any = None
        self._dead: list[Any] = []
        self._monitors: frozenset[str] = frozenset()
        self._monitors_asked = -_MONITORS_FOR_S
        self._failed: tuple[float, str] = (-_FAILED_FOR_S, "")

    @property
    def rbd_pool(self) -> str:
        """The rbd pool's name."""
        return self._options.rbd_pool

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """Yield an I/O context of the pool and namespace; Ceph's errors become the interface's.

        Raises PoolUnavailable (no answer, wrong key, no such pool), PoolFull. What has a meaning only the caller
        knows (ObjectNotFound, ImageBusy ...) the caller catches inside.
        """
        with self.errors():
            context = self.connection().open_ioctx(self._options.rbd_pool)
            try:
                context.set_namespace(self._options.namespace)
                context.set_osdmap_full_try()  # a full pool answers with an error instead of never
                yield context
            finally:
                context.close()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what librados and librbd raise into a ProviderError."""
        try:
            yield
        except (rados.Error, rbd.Error) as error:
            raise self._translated(error) from error

    def connection(self) -> Any:
        """Return the connected rados.Rados. Raises PoolUnavailable."""
        with self._lock:
            if self._connection is None:
                since, message = self._failed
                if time.monotonic() - since < _FAILED_FOR_S:
                    raise PoolUnavailable(message)
                try:
                    self._connection = self._connect()
                except (rados.Error, rbd.Error) as error:
                    message = self._explained(error)
                    self._failed = (time.monotonic(), message)
                    raise PoolUnavailable(message) from error
            return self._connection

    def open_data(self, image: Any, snap_id: int | None) -> Any:
        """Return an I/O context of an image's data pool that reads a snapshot (None: the present).

        The caller closes it. Raises PoolUnavailable, Ceph's errors.
        """
        context = self.connection().open_ioctx2(image.data_pool_id())
        context.set_namespace(self._options.namespace)
        if snap_id is not None:
            context.set_read(snap_id)
        return context

    def client_id(self) -> int:
        """Return the cluster's number for this client, as watchers show it."""
        return int(self.connection().get_instance_id())

    def command(self, prefix: str, **arguments: str) -> Any:
        """Return a monitor command's answer. Raises PoolUnavailable."""
        request = json.dumps({"prefix": prefix, "format": "json", **arguments})
        with self.errors():
            code, answer, said = self.connection().mon_command(request, b"", timeout=self._options.timeout_s)
        if code != 0:
            raise PoolUnavailable(f"{self._where()}: `ceph {prefix}` is refused: {said or errno.errorcode.get(-code)}")
        return json.loads(answer)

    def space(self) -> Space:
        """Return the room in the rbd pool: what the cluster has left for it, and no more than its quota."""
        for pool in self.command("df", detail="detail")["pools"]:
            if pool["name"] == self._options.rbd_pool:
                stats = pool["stats"]
                used, free = stats["stored"], stats["max_avail"]
                if quota := stats.get("quota_bytes"):
                    free = max(0, min(free, quota - used))
                return Space(used + free, free)
        raise PoolUnavailable(f"{self._where()}: there is no such pool in the cluster")

    def check_room(self, needed_bytes: int) -> None:
        """Raise PoolFull when the pool is marked as full, or cannot take that much more."""
        for pool in self.command("osd pool ls", detail="detail"):
            if pool["pool_name"] == self._options.rbd_pool and "full" in pool["flags_names"].split(","):
                raise PoolFull(f"{self._where()}: the cluster has marked the pool as full; make room")
        free = self.space().free_bytes
        if needed_bytes > free:
            raise PoolFull(f"{self._where()}: {needed_bytes} bytes are needed and {free} are free; make room")

    def has_monitor(self, named: Sequence[str]) -> bool:
        """Tell whether one of these "host:port" or hosts is a monitor of the cluster.

        Asked once: a monitor writes every command into its log, by a commit that would delay a cut soon after.
        """
        wanted = {name.lower() for name in named}
        if self._monitors & wanted:
            return True
        if time.monotonic() - self._monitors_asked > _MONITORS_FOR_S:
            self._monitors = self._listed_monitors() | {word.lower() for word in self._options.monitors}
            self._monitors_asked = time.monotonic()
        return bool(self._monitors & wanted)

    def _listed_monitors(self) -> frozenset[str]:
        found = set()
        for monitor in self.command("mon dump")["mons"]:
            for address in monitor["public_addrs"]["addrvec"]:
                host, _, _port = address["addr"].rpartition(":")
                found |= {address["addr"], host.strip("[]")}
        return frozenset(found)

    def close(self) -> None:
        """Disconnect; connection() would connect anew."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.shutdown()

    def _connect(self) -> Any:
        options = self._options
        settings = {
            "client_mount_timeout": str(_CONNECT_TIMEOUT_S),
            "rados_mon_op_timeout": str(options.timeout_s),
            "rados_osd_op_timeout": str(options.timeout_s),
            "rbd_default_clone_format": "2",  # clones that need no protected snapshots
        }
        if options.monitors:
            settings["mon_host"] = ",".join(options.monitors)
        if options.keyring:
            settings["keyring"] = str(options.keyring)
        conf = str(options.conf) if options.conf else ""
        connection = rados.Rados(name=f"client.{options.user}", conffile=conf or None, conf=settings)
        try:
            connection.connect()
        except BaseException:
            connection.shutdown()
            raise
        return connection

    def _translated(self, error: Exception) -> ProviderError:
        number = abs(getattr(error, "errno", 0) or 0)
        if number in _FULL:
            return PoolFull(f"{self._where()}: the pool is full; make room")
        if number == errno.ESHUTDOWN:
            with self._lock:  # blocklisted: this client is dead to the cluster, the next call is another's
                self._dead.append(self._connection)  # open images still refer to it
                self._connection = None
        return PoolUnavailable(self._explained(error))

    def _explained(self, error: Exception) -> str:
        number = abs(getattr(error, "errno", 0) or 0)
        user = f"client.{self._options.user}"
        if number in _REFUSED:
            return f"{self._where()}: the cluster refuses {user}: check its key and its rights (README, Ceph)"
        if number == errno.ETIMEDOUT:
            return f"{self._where()}: the cluster does not answer"
        if isinstance(error, rados.ObjectNotFound) and self._connection is None:
            return f"{self._where()}: conf or keyring of {user} cannot be found"
        return f"{self._where()}: {error}"

    def _where(self) -> str:
        namespace = f"/{self._options.namespace}" if self._options.namespace else ""
        return f"ceph pool {self._options.rbd_pool}{namespace}"


def read_omap_keys(context: Any, name: str, batch: int = 1000) -> list[str]:
    """Return the keys of an object's omap, none when there is no such object."""
    found: list[str] = []
    while True:
        with rados.ReadOpCtx() as operation:
            keys, _ = context.get_omap_keys(operation, found[-1] if found else "", batch)
            try:
                context.operate_read_op(operation, name)
            except rados.ObjectNotFound:
                return found
            more = [key for key, _ in keys]
        found += more
        if len(more) < batch:
            return found


def read_omap(context: Any, name: str, key: str) -> bytes | None:
    """Return one value of an object's omap, or None."""
    with rados.ReadOpCtx() as operation:
        values, _ = context.get_omap_vals_by_keys(operation, (key,))
        try:
            context.operate_read_op(operation, name)
        except rados.ObjectNotFound:
            return None
        return dict(values).get(key)


def write_omap(context: Any, name: str, values: Sequence[tuple[str, bytes]]) -> None:
    """Set values in an object's omap; the object is made when it is not there."""
    with rados.WriteOpCtx() as operation:
        context.set_omap(operation, tuple(key for key, _ in values), tuple(value for _, value in values))
        context.operate_write_op(operation, name)


def remove_omap(context: Any, name: str, key: str) -> None:
    """Remove a key from an object's omap; fine when it is not there."""
    with rados.WriteOpCtx() as operation:
        context.remove_omap_keys(operation, (key,))
        with suppress(rados.ObjectNotFound):
            context.operate_write_op(operation, name)
