"""A one-node Ceph in seconds: one monitor, one OSD in memory, one manager, cephx as in production.

Everything lies below the lab's state directory and listens on loopback only. The daemons are stopped, paused and
started again one by one for fault tests. `commit_interval_s` is the monitor's paxos_propose_interval: Ceph's own
second makes every snapshot wait for it, which tests need not (bench/rbd_window.py does).
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tests.lab import state

Daemon = Literal["mon", "osd", "mgr"]

_GIB = 1 << 30
_CONF = """\
[global]
fsid = {fsid}
mon host = {monitors}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {directory}/$name.keyring
run dir = {directory}
admin socket = {directory}/$name.asok
log file = {directory}/log/$name.log
mon cluster log file = {directory}/log/cluster.log
[mon]
keyring = {directory}/mon.keyring
mon data = {directory}/mon
mon data avail crit = 0
mon data avail warn = 0
mon allow pool delete = true
mon allow pool size one = true
mon warn on pool no redundancy = false
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
paxos propose interval = {commit_interval_s}
mon osd down out interval = 0
[osd]
osd data = {directory}/osd
osd objectstore = memstore
memstore device bytes = {size}
osd class load list = *
osd class default list = *
[mgr]
mgr data = {directory}/mgr
mgr stats period = {stats_period_s}
[client]
admin socket =
"""


class CommandFailed(Exception):
    """A program of Ceph's refused; the message has what it said."""


class CephCluster:
    """One cluster, named by its directory below the lab's state. Safe to use from a `finally`."""

    def __init__(
        self,
        name: str = "ceph",
        *,
        commit_interval_s: float = 0.05,
        stats_period_s: int = 1,
        manager: bool = True,
        size: int = 16 * _GIB,
    ) -> None:
        self.directory = state.DEFAULT_STATE_DIR / name
        self.conf = self.directory / "ceph.conf"
        self.ports = (_free_port(), _free_port())
        self._commit_interval_s = commit_interval_s
        self._stats_period_s = stats_period_s
        self._manager = manager
        self._size = size
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def monitors(self) -> tuple[tuple[str, int], ...]:
        """As libvirt's <host> elements have them."""
        return (("127.0.0.1", self.ports[1]),)

    def start(self) -> None:
        """Make and start the cluster; it answers when this returns."""
        state.prepare()
        shutil.rmtree(self.directory, ignore_errors=True)
        for part in ("mon", "osd", "mgr", "log"):
            (self.directory / part).mkdir(parents=True)
        fsid = str(uuid.uuid4())
        v2, v1 = self.ports
        monitors = f"[v2:127.0.0.1:{v2}/0,v1:127.0.0.1:{v1}/0]"
        self.conf.write_text(
            _CONF.format(
                fsid=fsid,
                monitors=monitors,
                directory=self.directory,
                commit_interval_s=self._commit_interval_s,
                stats_period_s=self._stats_period_s,
                size=self._size,
            )
        )
        self._make_keys()
        monmap = self.directory / "monmap"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitors, monmap)
        keyring = self.directory / "mon.keyring"
        self._run("ceph-mon", "-c", self.conf, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self.start_daemon("mon")
        osd = str(uuid.uuid4())
        self.ceph("osd", "new", osd)
        self._run("ceph-osd", "-c", self.conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        self.start_daemon("osd")
        if self._manager:
            self.start_daemon("mgr")
        self._wait_up()

    def stop(self) -> None:
        """Kill every daemon, forget all data. Repeatable."""
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait()
        self._running.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def pool(self, name: str, *, namespaces: tuple[str, ...] = (), quota_bytes: int = 0) -> None:
        """Make an rbd pool."""
        self.ceph("osd", "pool", "create", name, "8")
        self.rbd("pool", "init", name)
        for namespace in namespaces:
            self.rbd("namespace", "create", f"{name}/{namespace}")
        if quota_bytes:
            self.ceph("osd", "pool", "set-quota", name, "max_bytes", str(quota_bytes))

    def client(self, name: str, *pools: str) -> Path:
        """Make a user with the rights that the README tells operators to give; returns its keyring."""
        osd = ", ".join(f"profile rbd pool={pool}" for pool in pools)
        keyring = self.directory / f"client.{name}.keyring"
        self.ceph("auth", "get-or-create", f"client.{name}", "mon", "profile rbd", "osd", osd, "-o", str(keyring))
        return keyring

    def start_daemon(self, daemon: Daemon) -> None:
        """Start one daemon; returns while it starts."""
        identity = {"mon": "a", "osd": "0", "mgr": "x"}[daemon]
        with (self.directory / "log" / f"{daemon}.out").open("ab") as output:
            self._running[daemon] = subprocess.Popen(
                [f"ceph-{daemon}", "-c", self.conf, "-f", "-i", identity],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=state.owned_environment(state.DEFAULT_STATE_DIR),
                start_new_session=True,
            )

    def kill_daemon(self, daemon: Daemon) -> None:
        """SIGKILL one daemon. The OSD's data is in its memory: pause that one instead."""
        process = self._running.pop(daemon)
        process.kill()
        process.wait()

    def pause(self, daemon: Daemon) -> None:
        """One daemon hangs until resume()."""
        self._running[daemon].send_signal(signal.SIGSTOP)

    def resume(self, daemon: Daemon) -> None:
        """End pause(). Repeatable."""
        self._running[daemon].send_signal(signal.SIGCONT)

    def ceph(self, *words: str) -> str:
        """Run `ceph ...` as admin; returns what it prints."""
        return self._run("ceph", "-c", self.conf, "--connect-timeout", "20", *words)

    def rbd(self, *words: str | Path) -> str:
        """Run `rbd ...` as admin; returns what it prints. Raises CommandFailed."""
        return self._run("rbd", "-c", self.conf, *map(str, words))

    def rados(self, pool: str, *words: str) -> str:
        """Run `rados -p POOL ...` as admin; returns what it prints. Raises CommandFailed."""
        return self._run("rados", "-c", self.conf, "-p", pool, *words)

    def rbd_json(self, *words: str) -> Any:
        """Run `rbd ... --format json`; returns what it answers."""
        return json.loads(self.rbd(*words, "--format", "json"))

    def full(self, pool: str) -> bool:
        """Whether the monitor has marked a pool as full."""
        listed = json.loads(self.ceph("osd", "pool", "ls", "detail", "--format", "json"))
        return any("full" in found["flags_names"].split(",") for found in listed if found["pool_name"] == pool)

    def log_tail(self) -> str:
        """The ends of the daemons' outputs, for errors."""
        return "".join(path.read_text(errors="replace")[-1000:] for path in (self.directory / "log").glob("*.out"))

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _make_keys(self) -> None:
        monitor = self.directory / "mon.keyring"
        self._run("ceph-authtool", "--create-keyring", monitor, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        everything = {"mon": "allow *", "osd": "allow *", "mgr": "allow *"}
        for name, caps in {
            "client.admin": everything,
            "osd.0": {"mon": "profile osd", "osd": "allow *", "mgr": "profile osd"},
            "mgr.x": {"mon": "profile mgr", "osd": "allow *"},
        }.items():
            keyring = self.directory / f"{name}.keyring"
            words = [word for service, allowed in caps.items() for word in ("--cap", service, allowed)]
            self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", name, *words)
            self._run("ceph-authtool", monitor, "--import-keyring", keyring)

    def _wait_up(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            status = json.loads(self.ceph("status", "--format", "json"))
            manager = status["mgrmap"]["available"] or not self._manager
            if status["osdmap"]["num_up_osds"] == 1 and manager:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the cluster does not come up: {status['health']} {self.log_tail()}")
            time.sleep(0.1)

    def _run(self, *words: str | Path) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CEPH_")}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode != 0:
            raise CommandFailed(f"{' '.join(map(str, words))} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
