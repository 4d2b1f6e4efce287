"""The ceph provider on real clusters: "main" and "small" in one, "other" in a second, in a namespace there.

Volumes are made, written and looked at with librbd and the rbd program; nothing of ours takes part.
"""

import hashlib
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rados
import rbd

from tests.conformance.storages import MIB, Storage
from tests.lab.ceph import CephCluster

_QUOTA = 320 * MIB


class Ceph(Storage):
    """RBD; `cut` as in the pool's configuration."""

    clones = True
    clones_volumes = True
    compares = True

    def __init__(self, cut: str) -> None:
        self.cut = cut
        self.name = f"ceph-{cut}"
        self.main = CephCluster("ceph-main")
        self.other = CephCluster("ceph-other")
        self._connections: dict[CephCluster, Any] = {}

    def start(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        with ThreadPoolExecutor(2) as starting:
            list(starting.map(CephCluster.start, (self.main, self.other)))
        self.main.pool("vms")
        self.main.pool("little", quota_bytes=_QUOTA)
        self.other.pool("vms", namespaces=("tenant",))
        self.main.client("frostgate", "vms", "little")
        self.other.client("frostgate", "vms")

    def stop(self) -> None:
        for connection in self._connections.values():
            connection.shutdown()
        self._connections.clear()
        for cluster in (self.main, self.other):
            cluster.stop()

    def pools(self) -> dict[str, dict[str, Any]]:
        def table(cluster: CephCluster, pool: str, **more: Any) -> dict[str, Any]:
            common = {"kind": "ceph", "conf": str(cluster.conf), "cut": self.cut, "commit_interval_s": 0.05}
            return {**common, "rbd_pool": pool, **more}

        return {
            "main": table(self.main, "vms"),
            "small": table(self.main, "little"),
            "other": table(self.other, "vms", namespace="tenant", timeout_s=4),
        }

    def create(self, volume: str, size: int = 4 * MIB, pool: str = "main", image_format: str = "raw") -> None:
        assert image_format == "raw"
        with self.context(pool) as context:
            rbd.RBD().create(context, volume, size, old_format=False)

    def write(self, volume: str, offset: int, data: bytes, pool: str = "main") -> None:
        with self.context(pool) as context, rbd.Image(context, volume) as image:
            for start in range(0, len(data), 16 * MIB):
                image.write(data[start : start + 16 * MIB], offset + start)
            image.flush()

    def remove(self, volume: str, pool: str = "main") -> None:
        """By `rbd rm`; into the trash when it has snapshots, as only that is possible then."""
        with self.context(pool) as context:
            try:
                with rbd.Image(context, volume) as image:
                    holder = image.group()["name"]
                    snapshots = list(image.list_snaps())
            except rbd.ImageNotFound:
                raise FileNotFoundError(volume) from None
            if holder:
                rbd.Group(context, holder).remove_image(context, volume)
            if snapshots:
                rbd.RBD().trash_move(context, volume)
            else:
                rbd.RBD().remove(context, volume)

    def replace(self, volume: str, pool: str = "main") -> None:
        self.remove(volume, pool)
        self.create(volume, pool=pool)
        self.write(volume, 0, b"another volume", pool)

    def resize(self, volume: str, size: int, pool: str = "main") -> None:
        with self.context(pool) as context, rbd.Image(context, volume) as image:
            image.resize(size)

    def digest(self, volume: str, pool: str = "main") -> str:
        digest = hashlib.sha256()
        place = self.place(pool)
        command = ["rbd", "-c", self.cluster(pool).conf, "export", "--no-progress", f"{place}/{volume}", "-"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            while part := process.stdout.read(MIB):
                digest.update(part)
        assert process.returncode == 0
        return digest.hexdigest()

    def member_digest(self, group: str, volume: str, pool: str = "main") -> str:
        digest = hashlib.sha256()
        with self.member(group, volume, pool) as image:
            for offset in range(0, image.size(), 4 * MIB):
                digest.update(image.read(offset, min(4 * MIB, image.size() - offset)))
        return digest.hexdigest()

    def member_ranges(self, group: str, volume: str, pool: str = "main") -> list[tuple[int, int]]:
        with self.member(group, volume, pool) as image:
            return _ranges(image)

    def ranges(self, volume: str, pool: str = "main") -> list[tuple[int, int]]:
        with self.context(pool) as context, rbd.Image(context, volume, read_only=True) as image:
            return _ranges(image)

    def exists(self, group: str, pool: str = "main") -> bool:
        name = f"frostgate.{group}"
        with self.context(pool) as context:
            if name in rbd.RBD().group_list(context):
                return True
            try:
                context.stat(f"frostgate.group.{group}")
            except rados.ObjectNotFound:
                return any(_snapshot_of(image, name) for image in _images(context))
            return True

    def source(self, volume: str, pool: str = "main") -> dict[str, Any]:
        return {"rbd": {"name": f"{self.place(pool)}/{volume}"}}

    def damage(self, group: str, pool: str = "main") -> None:
        name = f"frostgate.{group}"
        with self.context(pool) as context:
            if name in rbd.RBD().group_list(context):
                rbd.Group(context, name).remove_snap("cut")
            for image in _images(context):
                if snapshot := _snapshot_of(image, name):
                    with rbd.Image(context, image_id=image.id()) as writable:
                        writable.remove_snap_by_id(snapshot)

    def make_independent(self, volume: str, pool: str = "main") -> None:
        if self.is_dependent(volume, pool):
            self.cluster(pool).rbd("flatten", "--no-progress", f"{self.place(pool)}/{volume}")

    def is_dependent(self, volume: str, pool: str = "main") -> bool:
        return "parent" in self.cluster(pool).rbd_json("info", f"{self.place(pool)}/{volume}")

    @contextmanager
    def in_use(self, volume: str, pool: str = "main") -> Iterator[str]:
        """qemu-storage-daemon, which has the image's exclusive lock as a VM does."""
        namespace = "namespace=tenant," if pool == "other" else ""
        rbd_pool = self.place(pool).split("/")[0]
        options = f"pool={rbd_pool},{namespace}image={volume},conf={self.cluster(pool).conf},user=admin"
        socket = self._directory / "qsd.sock"
        process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"driver=rbd,node-name=disk,{options}"),
                *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
                *("--export", "type=nbd,id=e,name=disk,node-name=disk,writable=on"),
            ]
        )
        try:
            deadline = time.monotonic() + 20
            watcher = None
            while watcher is None:
                assert process.poll() is None
                assert time.monotonic() < deadline
                watcher = self._watcher(volume, pool)
            yield watcher
        finally:
            process.terminate()
            process.wait()
            socket.unlink(missing_ok=True)

    @contextmanager
    def full(self, pool: str = "small") -> Iterator[None]:
        with self.context(pool) as context:
            for number in range(_QUOTA // (8 * MIB) + 4):
                context.write_full(f"filler.{number}", b"x" * 8 * MIB)
        self._wait_full(pool, full=True)
        try:
            yield
        finally:
            with self.context(pool) as context:
                context.set_osdmap_full_try()
                for number in range(_QUOTA // (8 * MIB) + 4):
                    context.remove_object(f"filler.{number}")
            self._wait_full(pool, full=False)

    @contextmanager
    def away(self, pool: str = "other") -> Iterator[None]:
        cluster = self.cluster(pool)
        assert cluster is self.other
        for daemon in ("mon", "osd"):
            cluster.pause(daemon)  # type: ignore[arg-type]
        try:
            yield
        finally:
            for daemon in ("mon", "osd"):
                cluster.resume(daemon)  # type: ignore[arg-type]

    def cluster(self, pool: str) -> CephCluster:
        return self.other if pool == "other" else self.main

    def place(self, pool: str) -> str:
        """The rbd pool, with the namespace."""
        return {"main": "vms", "small": "little", "other": "vms/tenant"}[pool]

    @contextmanager
    def context(self, pool: str) -> Iterator[Any]:
        cluster = self.cluster(pool)
        if cluster not in self._connections:
            self._connections[cluster] = rados.Rados(conffile=str(cluster.conf), name="client.admin")
            self._connections[cluster].connect()
        rbd_pool, _, namespace = self.place(pool).partition("/")
        with self._connections[cluster].open_ioctx(rbd_pool) as context:
            context.set_namespace(namespace)
            yield context

    @contextmanager
    def member(self, group: str, volume: str, pool: str = "main") -> Iterator[Any]:
        """The image that has a member, set to its snapshot; its name may be a hidden one by now."""
        with self.context(pool) as context:
            for image in _images(context):
                names = (image.get_name(), dict(image.metadata_list()).get("frostgate.volume"))
                snapshot = _snapshot_of(image, f"frostgate.{group}")
                if volume in names and snapshot:
                    image.set_snap_by_id(snapshot)
                    yield image
                    return
        raise AssertionError(f"no image has a snapshot of {volume} in {group}")

    def _watcher(self, volume: str, pool: str) -> str | None:
        status = self.cluster(pool).rbd_json("status", f"{self.place(pool)}/{volume}")
        watchers = [str(found["address"]) for found in status["watchers"]]
        return watchers[0] if watchers else None

    def _wait_full(self, pool: str, *, full: bool) -> None:
        deadline = time.monotonic() + 60
        while self.cluster(pool).full(self.place(pool)) is not full:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def _images(context: Any) -> Iterator[Any]:
    for found in [*rbd.RBD().list2(context), *rbd.RBD().trash_list(context)]:
        try:
            image = rbd.Image(context, image_id=found["id"], read_only=True)
        except rbd.ImageNotFound:
            continue
        try:
            yield image
        finally:
            image.close()


def _snapshot_of(image: Any, name: str) -> int:
    """The id of the snapshot that belongs to a Frostgate group, or 0."""
    for found in image.list_snaps():
        if found["name"] == name or (found.get("group") or {}).get("name") == name:
            return int(found["id"])
    return 0


def _ranges(image: Any) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []

    def add(offset: int, length: int, exists: bool) -> None:
        if not exists:
            return
        if found and sum(found[-1]) == offset:
            offset, length = found[-1][0], found.pop()[1] + length
        found.append((offset, length))

    image.diff_iterate(0, image.size(), None, add)
    return found
