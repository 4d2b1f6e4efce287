"""Finds and removes what a lab left running: processes, mounts, loop devices, files.

Nothing is remembered in memory or pid files, so this works after kill -9 of whoever started it:
  processes   those whose environment names the state directory as owner, and those that live in a
              private libvirtd's mount namespace (QEMU gets a scrubbed environment from libvirt)
  mounts      those below the state directory
  loops       those whose backing file is below it
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from tests.lab.state import DEFAULT_STATE_DIR, OWNER_VARIABLE


def processes(state_dir: Path = DEFAULT_STATE_DIR) -> list[int]:
    """Ids of the lab's processes, never our own or an ancestor's."""
    marker = f"{OWNER_VARIABLE}={state_dir.resolve()}".encode()
    namespaces = list(state_dir.glob("*/run"))
    ours = _ancestors()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in ours or not _is_alive(entry):
            continue
        if _owned(entry, marker) or any(in_namespace(int(entry.name), run) for run in namespaces):
            found.append(int(entry.name))
    return sorted(found)


def in_namespace(pid: int, run_directory: Path) -> bool:
    """Whether a process sees run_directory as /run/libvirt, as only a private libvirtd's family does."""
    try:
        seen, expected = os.stat(f"/proc/{pid}/root/run/libvirt"), os.stat(run_directory)
    except OSError:
        return False
    return (seen.st_dev, seen.st_ino) == (expected.st_dev, expected.st_ino)


def mounts(state_dir: Path = DEFAULT_STATE_DIR) -> list[Path]:
    """Mount points at or below the state directory, in the order in which they can be unmounted."""
    state = state_dir.resolve()
    points = [_unescape(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in reversed(points) if point == state or state in point.parents]


def loop_devices(state_dir: Path = DEFAULT_STATE_DIR) -> list[Path]:
    """Loop devices backed by a file below the state directory (deleted files too)."""
    prefix = f"{state_dir.resolve()}/"
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if backing.read_text().startswith(prefix):
                found.append(Path("/dev") / backing.parts[3])
        except OSError:
            continue  # detached while we looked
    return found


def kill(pids: Iterable[int], timeout_s: float = 10.0) -> list[int]:
    """SIGKILL the processes and wait; returns those that are still there."""
    remaining = list(pids)
    for pid in remaining:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + timeout_s
    while remaining and time.monotonic() < deadline:
        remaining = [pid for pid in remaining if _is_alive(Path(f"/proc/{pid}"))]
        if remaining:
            time.sleep(0.02)
    return remaining


def remove(state_dir: Path = DEFAULT_STATE_DIR) -> list[str]:
    """Remove everything of the lab and its state directory; returns what could not be removed.

    Harmless when nothing is there. Repeats because a process can start another while it dies.
    """
    if not state_dir.exists():
        return []
    for _ in range(3):
        running = processes(state_dir)
        if not running:
            break
        kill(running)
    # before the mounts, too: the file below a device in a file system that is unmounted lazily cannot be named any more
    _detach(loop_devices(state_dir))
    for point in mounts(state_dir):
        if subprocess.run(["umount", point], check=False, capture_output=True).returncode != 0:
            subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)
    _detach(loop_devices(state_dir))
    _wait_detached(state_dir)
    left = [f"process {pid}" for pid in processes(state_dir)]
    left += [f"mount {point}" for point in mounts(state_dir)]
    left += [f"loop device {device}" for device in loop_devices(state_dir)]
    if not mounts(state_dir):
        shutil.rmtree(state_dir, ignore_errors=True)
        left += [f"directory {state_dir}"] if state_dir.exists() else []
    return left


def _detach(devices: Iterable[Path]) -> None:
    for device in devices:
        subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)


def _wait_detached(state_dir: Path, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while loop_devices(state_dir) and time.monotonic() < deadline:
        time.sleep(0.02)


def _is_alive(entry: Path) -> bool:
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _owned(entry: Path, marker: bytes) -> bool:
    try:
        return marker in (entry / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _ancestors() -> set[int]:
    found, pid = set(), os.getpid()
    while pid > 0:
        found.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return found


def _unescape(mountinfo_path: str) -> Path:
    return Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mountinfo_path))
