"""The storpool provider on two simulated clusters: "main" and "small" are templates of one, "other" is of a second.

Volumes are made and looked at with StorPool's bindings and the devices of this host; nothing of ours takes part. A
member is looked at by a volume of its own, made from it with a template that is no pool: so what the gateway has
attached stays as it is.
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from storpool import spapi

from tests.conformance.bench import Bench
from tests.conformance.storages import MIB, Storage
from tests.lab.storpool import CLIENT, TEMPLATE, StorpoolSim

SMALL = 320 * MIB
_TEMPLATES = {"main": TEMPLATE, "other": TEMPLATE, "small": "small"}
_ORACLE = "oracle"
_OTHER_CLIENT = 2
_BLOCK = 4096


class Storpool(Storage):
    """Volumes of templates."""

    name = "storpool"
    clones = True
    clones_volumes = True
    compares = True

    def __init__(self) -> None:
        self.main = StorpoolSim("storpool-main")
        self.other = StorpoolSim("storpool-other", cluster="other", cluster_id="oth.c")

    def start(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        for cluster in (self.main, self.other):
            cluster.start()
            for template in ("small", _ORACLE):
                cluster.api().volumeTemplateCreate({"name": template, "replication": 3, "placeAll": "hdd"})

    def stop(self) -> None:
        for cluster in (self.main, self.other):
            cluster.stop()

    def pools(self) -> dict[str, dict[str, Any]]:
        return {
            "main": self.main.pool(retry_s=1),
            "small": self.main.pool(template="small"),
            "other": self.other.pool(timeout_s=4, cut_timeout_s=4),
        }

    def create(self, volume: str, size: int = 4 * MIB, pool: str = "main", image_format: str = "raw") -> None:
        assert image_format == "raw"
        self.api(pool).volumeCreate({"name": volume, "size": size, "template": _TEMPLATES[pool]})

    def write(self, volume: str, offset: int, data: bytes, pool: str = "main") -> None:
        with self.device(volume, pool) as path, path.open("r+b", buffering=0) as file:
            view = memoryview(data)
            while view:
                written = os.pwrite(file.fileno(), view[:MIB], offset)
                view, offset = view[written:], offset + written
            os.fsync(file.fileno())

    def remove(self, volume: str, pool: str = "main") -> None:
        try:
            self.api(pool).volumeDelete(volume)
        except spapi.ApiError as error:
            if error.name == "objectDoesNotExist":
                raise FileNotFoundError(volume) from None
            raise

    def replace(self, volume: str, pool: str = "main") -> None:
        self.remove(volume, pool)
        self.create(volume, pool=pool)
        self.write(volume, 0, b"another volume", pool)

    def resize(self, volume: str, size: int, pool: str = "main") -> None:
        self.api(pool).volumeUpdate(volume, {"size": size, "shrinkOk": True})

    def digest(self, volume: str, pool: str = "main") -> str:
        with self.device(volume, pool) as path:
            return _sha256(path)

    def member_digest(self, group: str, volume: str, pool: str = "main") -> str:
        with self.member(group, volume, pool) as path:
            return _sha256(path)

    def member_ranges(self, group: str, volume: str, pool: str = "main") -> list[tuple[int, int]]:
        with self.member(group, volume, pool) as path:
            return _ranges(path)

    def ranges(self, volume: str, pool: str = "main") -> list[tuple[int, int]]:
        with self.device(volume, pool) as path:
            return _ranges(path)

    def exists(self, group: str, pool: str = "main") -> bool:
        api = self.api(pool)
        listed = [*api.volumesList(), *(one for one in api.snapshotsList() if not one.deleted)]
        return any((one.tags or {}).get("frostgate") == group for one in listed if _is_in(one, pool))

    def source(self, volume: str, pool: str = "main") -> dict[str, Any]:
        return {"block_device": str(self.cluster(pool).devices / volume)}

    def damage(self, group: str, pool: str = "main") -> None:
        for one in self.snapshots(group, pool):
            self.api(pool).snapshotDelete(one.name)

    @contextmanager
    def in_use(self, volume: str, pool: str = "main") -> Iterator[str]:
        """Attached to another host, as where its VM runs."""
        self.cluster(pool).attach(volume, _OTHER_CLIENT)
        try:
            yield f"client {_OTHER_CLIENT}"
        finally:
            self.cluster(pool).detach(volume)

    @contextmanager
    def full(self, pool: str = "small") -> Iterator[None]:
        self.cluster(pool).set_capacity(1)
        try:
            yield
        finally:
            self.cluster(pool).set_capacity(1 << 40)

    @contextmanager
    def away(self, pool: str = "other") -> Iterator[None]:
        """The cluster's management hangs."""
        os.kill(self.cluster(pool).pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.cluster(pool).pid, signal.SIGCONT)

    def cluster(self, pool: str) -> StorpoolSim:
        return self.other if pool == "other" else self.main

    def api(self, pool: str = "main") -> Any:
        return self.cluster(pool).api()

    def snapshots(self, group: str, pool: str = "main") -> list[Any]:
        """A group's members, as the API lists them."""
        return [
            one
            for one in self.api(pool).snapshotsList()
            if (one.tags or {}).get("frostgate") == group and not one.deleted and _is_in(one, pool)
        ]

    @contextmanager
    def device(self, volume: str, pool: str = "main") -> Iterator[Path]:
        """A volume attached to this host, for as long as it is looked at."""
        cluster = self.cluster(pool)
        cluster.attach(volume)
        try:
            yield cluster.devices / volume
        finally:
            cluster.api().volumesReassignWait({"reassign": [{"volume": volume, "detach": [CLIENT]}]})

    @contextmanager
    def member(self, group: str, volume: str, pool: str = "main") -> Iterator[Path]:
        """A volume with a member's content."""
        (snapshot,) = [one for one in self.snapshots(group, pool) if one.tags["frostgate-volume"] == volume]
        name, api = f"oracle-{os.getpid()}-{id(snapshot)}", self.api(pool)
        api.volumeCreate({"name": name, "parent": snapshot.name, "template": _ORACLE})
        try:
            with self.device(name, pool) as path:
                yield path
        finally:
            with suppress(spapi.ApiError):
                api.volumeDelete(name)


def storpool(bench: Bench) -> Storpool:
    """The storage of a test that only StorPool runs."""
    assert isinstance(bench.storage, Storpool)
    return bench.storage


def cluster(bench: Bench) -> StorpoolSim:
    """The cluster of the pools "main" and "small"."""
    return storpool(bench).main


def snapshots(bench: Bench, group: str) -> list[str]:
    """Names of the volumes of which there are snapshots of a group."""
    return sorted(one.tags["frostgate-volume"] for one in storpool(bench).snapshots(group))


def attachments(bench: Bench, name: str) -> list[tuple[int, str]]:
    """Clients and rights of a volume or snapshot."""
    return sorted((one.client, one.rights) for one in cluster(bench).api().attachmentsList() if one.volume == name)


def _is_in(one: Any, pool: str) -> bool:
    return bool(one.templateName == _TEMPLATES[pool])


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ranges(path: Path) -> list[tuple[int, int]]:
    """What is not zero, in blocks of 4 KiB: all that a block device tells."""
    found: list[tuple[int, int]] = []
    with path.open("rb", buffering=0) as file:
        offset = 0
        while window := file.read(MIB):
            if window != bytes(len(window)):
                for begin in range(0, len(window), _BLOCK):
                    if window[begin : begin + _BLOCK].strip(b"\0"):
                        if found and sum(found[-1]) == offset + begin:
                            found[-1] = (found[-1][0], found[-1][1] + _BLOCK)
                        else:
                            found.append((offset + begin, _BLOCK))
            offset += len(window)
    return found
