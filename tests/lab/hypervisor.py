"""A private libvirtd: the real daemon, out of sight of the machine's own.

It runs in a mount namespace in which /etc, /var/lib, /run, /var/log and /var/cache/libvirt are
directories of ours; on the machine at most empty directories of those names appear. Clients
outside reach it through its socket by `uri`. Works without systemd, cgroups and virtlogd.
QEMU processes survive the death of the daemon, as they do in production, and a restarted daemon
finds them again. Whoever dies without stop(): `python -m tests.lab down` cleans up.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import libvirt

from tests.lab import leftovers, state

_QEMU_CONF = """\
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""
_LIBVIRTD_CONF = """\
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_group = "root"
unix_sock_rw_perms = "0700"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
host_uuid = "5f6f7374-6761-4e65-8c61-620000000001"
"""
_DIRECTORIES = ("etc", "lib", "run", "log")
_ENTER = r"""
set -e
state=$1 cache=$2
mkdir -p /etc/libvirt /var/lib/libvirt /run/libvirt /var/log/libvirt /var/cache/libvirt
mount --bind "$state/etc" /etc/libvirt
mount --bind "$state/lib" /var/lib/libvirt
mount --bind "$state/run" /run/libvirt
mount --bind "$state/log" /var/log/libvirt
mount --bind "$cache" /var/cache/libvirt
# libvirtd looks its default user up before it reads that ours is root; the user comes with
# libvirt-daemon-system, which nothing else here needs
know() {
    getent "$1" libvirt-qemu > /dev/null && return
    { cat "/etc/$1"; echo "$2"; } > "$state/$1"
    mount --bind "$state/$1" "/etc/$1"
}
know passwd libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin
know group libvirt-qemu:x:64055:
exec libvirtd --pid-file /run/libvirt/libvirtd.pid
"""


class Hypervisor:
    """One private libvirtd with its own domains, named by its directory below the lab's state.

    Starting where one already runs (`python -m tests.lab up`) joins that one.
    """

    def __init__(self, state_dir: Path = state.DEFAULT_STATE_DIR, name: str = "hypervisor") -> None:
        self.state_dir = state_dir
        self.directory = state_dir / name
        self._daemon: subprocess.Popen[bytes] | None = None
        self._connection: libvirt.virConnect | None = None

    @property
    def uri(self) -> str:
        """For libvirt.open and `virsh -c`, from any process of this machine."""
        return f"qemu+unix:///system?socket={self.directory}/run/libvirt-sock"

    @property
    def log(self) -> Path:
        """libvirtd's own log: warnings and errors."""
        return self.directory / "log" / "libvirtd.log"

    @property
    def daemon_pid(self) -> int | None:
        """Process id of libvirtd; None when it does not run."""
        try:
            pid = int((self.directory / "run" / "libvirtd.pid").read_text())
        except (OSError, ValueError):
            return None
        return pid if leftovers.in_namespace(pid, self.directory / "run") else None

    def start(self, timeout_s: float = 30.0) -> None:
        """Start libvirtd, or join the running one, and wait until it answers. Repeatable."""
        state.prepare(self.state_dir)
        if self.daemon_pid is None:
            # probing QEMU takes seconds; libvirt checks that what it kept still fits the binary
            cache = state.BUILD_DIR / "libvirt-cache"
            for directory in (*(self.directory / name for name in _DIRECTORIES), cache):
                directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "etc" / "qemu.conf").write_text(_QEMU_CONF)
            (self.directory / "etc" / "libvirtd.conf").write_text(_LIBVIRTD_CONF)
            with (self.directory / "log" / "output").open("ab") as output:
                enter = ["unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", _ENTER, "sh"]
                self._daemon = subprocess.Popen(
                    [*enter, self.directory, cache],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=state.owned_environment(self.state_dir),
                    start_new_session=True,
                )
        self._wait_answering(timeout_s)

    def stop(self) -> None:
        """Kill every domain and libvirtd, remove its directory. Repeatable.

        All at once by SIGKILL: nothing of it is used again, and libvirtd takes seconds to say goodbye.
        """
        self.disconnect()
        for _ in range(3):
            family = self.processes()
            if not family:
                break
            leftovers.kill(family)
        if self._daemon is not None:
            self._daemon.wait(timeout=10)
            self._daemon = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def kill_daemon(self, signal_number: signal.Signals = signal.SIGKILL) -> None:
        """For fault tests: libvirtd dies, its guests live on. With SIGSTOP it hangs instead."""
        pid = self.daemon_pid
        if pid is None:
            return
        os.kill(pid, signal_number)
        if signal_number != signal.SIGSTOP:
            self._wait_gone(pid, timeout_s=10.0)
            self.disconnect()

    def restart_daemon(self) -> None:
        """A new libvirtd that finds the running guests again."""
        self.kill_daemon(signal.SIGTERM)
        self.start()

    def connect(self) -> libvirt.virConnect:
        """This object's one connection, made again when it broke; for another, libvirt.open(uri)."""
        if self._connection is not None:
            try:
                if self._connection.isAlive():
                    return self._connection
            except libvirt.libvirtError:
                self.disconnect()
        self._connection = libvirt.open(self.uri)
        return self._connection

    def disconnect(self) -> None:
        """Close this object's connection, if it has one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except libvirt.libvirtError:
                return  # the daemon is gone, and the connection with it

    def processes(self) -> list[int]:
        """libvirtd and its QEMU processes."""
        run = self.directory / "run"
        pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [pid for pid in pids if run.is_dir() and leftovers.in_namespace(pid, run)]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_answering(self, timeout_s: float) -> None:
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.connect().getLibVersion()
            except libvirt.libvirtError:
                died = self._daemon is not None and self._daemon.poll() is not None
                if died or time.monotonic() > deadline:
                    logs = (self.directory / "log" / "output", self.log)
                    said = "".join(log.read_text() for log in logs if log.exists())
                    self.stop()
                    raise RuntimeError(f"libvirtd does not answer at {self.uri}: {said}") from None
                time.sleep(0.05)
            else:
                return

    def _wait_gone(self, pid: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.daemon_pid == pid:
            if self._daemon is not None and self._daemon.pid == pid:
                self._daemon.poll()
            time.sleep(0.02)
