"""Attaching snapshots and record volumes to the StorPool client on this host, and never leaving them so.

Who needs a device takes it, and gives it back; the last one to do so has it detached. What a gateway that was killed
left attached is found by Frostgate's tags and detached before the first device is taken, and before a snapshot is
deleted. Detaching is never forced: what somebody on this host has open for himself stays.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from providers.base import CapabilityMissing, PoolUnavailable, ProviderError
from providers.storpool.cluster import Busy, Cluster, Missing
from providers.storpool.objects import Found, Objects
from providers.storpool.options import StorPoolOptions

log = structlog.get_logger()


@dataclass
class _Use:
    """One object that is attached or about to be; `holders` counts who uses it, `interested` who may."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    holders: int = 0
    interested: int = 0


class Devices:
    """The attachments of one pool's objects on this host. Thread-safe."""

    def __init__(self, cluster: Cluster, objects: Objects, options: StorPoolOptions) -> None:
        """Take the cluster; nothing is attached yet."""
        self._cluster = cluster
        self._objects = objects
        self._options = options
        self._lock = threading.Lock()
        self._uses: dict[str, _Use] = {}
        self._sweeping = threading.Lock()
        self._swept = False

    def client(self) -> int:
        """Return the number of this host's client. Raises CapabilityMissing when nobody said."""
        client = self._cluster.client_id
        if client is None:
            raise CapabilityMissing(
                "which StorPool client this host is has to be said: client_id of the pool, or SP_OURID in storpool.conf"
            )
        return client

    @contextmanager
    def attached(self, found: Found) -> Iterator[Path]:
        """Yield the device of an object; a volume for writing too. Raises CapabilityMissing, PoolUnavailable."""
        path = self.take(found)
        try:
            yield path
        finally:
            self.give_back(found)

    def take(self, found: Found) -> Path:
        """Return the device of an object, attached until give_back() was called as often. Raises as attached()."""
        self.sweep_once()
        with self._lock:
            use = self._uses.setdefault(found.global_id, _Use())
            use.interested += 1
        try:
            with use.lock:
                if use.holders == 0:
                    self._attach(found)
                use.holders += 1
        except BaseException:
            self._lose_interest(found.global_id, use)
            raise
        return self._options.devices_by_id / found.global_id

    def give_back(self, found: Found) -> None:
        """Detach an object when nobody uses it any more.

        A failure is logged and no more: it is detached as a leftover before the object is deleted.
        """
        use = self._uses[found.global_id]
        try:
            with use.lock:
                use.holders -= 1
                if use.holders == 0:
                    self.detach(found)
        except ProviderError as error:
            log.warning("could not be detached yet", device=found.global_id, error=str(error))
        finally:
            self._lose_interest(found.global_id, use)

    def detach(self, found: Found) -> None:
        """Detach an object from this host; fine when it is not attached. Raises Busy, PoolUnavailable."""
        try:
            self._reassign({found.kind: found.by_id, "detach": [self.client()]})
        except Missing:
            return  # deleted, and its attachment with it

    def sweep_once(self) -> None:
        """Detach what an earlier process left attached on this host, the first time it is called."""
        with self._sweeping:
            if not self._swept:
                self.sweep([*self._objects.members(), *self._objects.records()])
                self._swept = True

    def sweep(self, objects: list[Found]) -> None:
        """Detach those objects of ours that are attached on this host and that nobody in this process uses."""
        client = self._cluster.client_id
        if client is None:
            return
        for found, attachment in self._objects.attachments_of(objects):
            if attachment.client == client and not self._is_held(found):
                self._detach_leftover(found)

    def _detach_leftover(self, found: Found) -> None:
        try:
            self.detach(found)
        except Busy as error:
            log.warning("somebody has a snapshot's device open", device=found.global_id, error=str(error))
        else:
            log.info("detached what an earlier process left attached", device=found.global_id)

    def _attach(self, found: Found) -> None:
        client = self.client()
        rights = "ro" if found.kind == "snapshot" else "rw"
        self._reassign({found.kind: found.by_id, rights: [client]})
        path = self._options.devices_by_id / found.global_id
        deadline = time.monotonic() + self._options.timeout_s
        while not os.path.exists(path):  # udev is about to make it
            if time.monotonic() > deadline:
                self.detach(found)
                raise PoolUnavailable(
                    f"{path} does not appear on this host: is client_id = {client} right, and the StorPool client "
                    "(storpool_block) running here?"
                )
            time.sleep(0.02)

    def _reassign(self, change: dict[str, object]) -> None:
        timeout_s = max(1, int(self._options.timeout_s / 2))
        self._cluster.call("volumesReassignWait", {"reassign": [change], "attachTimeout": timeout_s})

    def _is_held(self, found: Found) -> bool:
        with self._lock:
            use = self._uses.get(found.global_id)
            return use is not None and use.interested > 0

    def _lose_interest(self, global_id: str, use: _Use) -> None:
        with self._lock:
            use.interested -= 1
            if use.interested == 0:
                self._uses.pop(global_id, None)
