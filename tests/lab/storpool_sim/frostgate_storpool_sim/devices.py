"""What this host's client has attached, as files: a FUSE file system with one file for each.

    images/GLOBAL.ID              the FUSE file system, read and written past the page cache
    dev/storpool/NAME             a link to it, or to the loop device upon it
    dev/storpool-byid/GLOBAL.ID   the same

as /dev/storpool and /dev/storpool-byid are links to StorPool's block devices.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from frostgate_storpool_sim.cluster import Device

FILESYSTEM_TYPE = "fuse.storpool-sim"


@dataclass(frozen=True)
class Attached:
    """A device, from its attaching to its detaching: attached again it has another serial number."""

    device: Device = field(compare=False)
    serial: int


class Devices:
    """Keeps links, and loop devices when asked for, as the attachments are. Safe to use from any thread."""

    def __init__(self, directory: Path, *, loop: bool) -> None:
        """Take the directory of images/ and dev/."""
        self.images = directory / "images"
        self.links = directory / "dev"
        self.by_id: dict[str, Attached] = {}
        self.openers: Counter[Attached] = Counter()
        """How often each is open; the file system counts."""
        self._shown: dict[str, Sequence[Device]] = {}
        self._serial = 0
        self._loop = loop
        self._lock = threading.RLock()
        self._loops: dict[str, Path] = {}
        self._ready = False

    def begin(self) -> None:
        """The file system answers from now on: let what was attached be there."""
        with self._lock:
            self._ready = True
            self._reconcile({})

    def show(self, cluster_id: str, devices: Sequence[Device]) -> None:
        """Let exactly these devices of a cluster be there. Repeatable. Raises OSError."""
        with self._lock:
            self._shown[cluster_id] = devices
            before, now = self.by_id, {}
            for device in (device for shown in self._shown.values() for device in shown):
                old = before.get(device.global_id)
                self._serial += 1
                now[device.global_id] = Attached(device, old.serial if old else self._serial)
            self.by_id = now  # the file system, in its thread, sees one or the other
            if self._ready:
                self._reconcile(before)

    def is_open(self, global_id: str) -> bool:
        """Whether a program has a device open."""
        with self._lock:
            loop, attached = self._loops.get(global_id), self.by_id.get(global_id)
            if loop is None:
                return attached is not None and self.openers[attached] > 0
        return _has_opener(loop)

    def end(self) -> None:
        """Take everything away, as long as the file system still answers. Repeatable."""
        with self._lock:
            for loop in self._loops.values():
                _losetup("--detach", loop)
            self._loops.clear()
            self._ready = False
        shutil.rmtree(self.links, ignore_errors=True)

    def _reconcile(self, before: dict[str, Attached]) -> None:
        for global_id in list(self._loops):
            old, new = before.get(global_id), self.by_id.get(global_id)
            if new is None or old is None or new.device.writable != old.device.writable:
                _losetup("--detach", self._loops.pop(global_id))
            elif new.device.size_bytes != old.device.size_bytes:
                _losetup("--set-capacity", self._loops[global_id])
        for global_id, attached in self.by_id.items():
            if self._loop and global_id not in self._loops:
                self._loops[global_id] = self._set_up(attached.device)
        self._link()

    def _set_up(self, device: Device) -> Path:
        how = () if device.writable else ("--read-only",)
        return Path(_losetup("--find", "--show", *how, self.images / device.global_id))

    def _link(self) -> None:
        wanted: dict[Path, Path] = {}
        for device in (attached.device for attached in self.by_id.values()):
            target = self._loops.get(device.global_id, self.images / device.global_id)
            wanted[self.links / "storpool-byid" / device.global_id] = target
            if not device.name.startswith("~"):
                wanted[self.links / "storpool" / device.name] = target
        for folder in ("storpool", "storpool-byid"):
            (self.links / folder).mkdir(parents=True, exist_ok=True)
            for link in (self.links / folder).iterdir():
                if link not in wanted or os.readlink(link) != str(wanted[link]):
                    link.unlink()
        for link, target in wanted.items():
            if not link.is_symlink():
                link.symlink_to(target)


def clear(directory: Path) -> None:
    """Remove the mount and the loop devices that a killed simulator left for a directory."""
    images = directory / "images"
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        if backing.read_text().startswith(f"{images}/"):
            _losetup("--detach", Path("/dev") / backing.parts[3])
    while any(line.split()[1:3] == [str(images), FILESYSTEM_TYPE] for line in _mounts()):
        subprocess.run(["fusermount3", "-u", "-z", images], check=True)
    shutil.rmtree(directory / "dev", ignore_errors=True)


def _mounts() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


def _losetup(*words: str | Path) -> str:
    done = subprocess.run(["losetup", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"losetup {' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout.strip()


def _has_opener(device: Path) -> bool:
    """Whether a process has a block device open, or it is mounted."""
    if any(line.split()[0] == str(device) for line in _mounts()):
        return True
    number = device.stat().st_rdev
    return any(_opens(process, number) for process in Path("/proc").glob("[0-9]*"))


def _opens(process: Path, number: int) -> bool:
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:
        return False  # it ended
    return any(_device_number(descriptor) == number for descriptor in descriptors)


def _device_number(descriptor: Path) -> int:
    try:
        return descriptor.stat().st_rdev
    except OSError:
        return -1  # closed meanwhile
