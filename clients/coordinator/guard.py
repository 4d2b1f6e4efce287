"""The thaw guard: a process of its own that thaws the guest when the coordinator cannot.

It is started and connected to libvirt before the guest is frozen, in a session of its own, so neither Ctrl-C nor
the death of the coordinator (kill -9 included) reaches it. On its standard input the coordinator says, a line
each, "freezing" (or "pausing") just before it does so and "thawed" once the guest is known to run again. When
the input ends, or `max_freeze_s` passes after "freezing", the guard thaws, as often as it takes, until the guest
says that it is thawed or the VM is gone. A freeze that the dead coordinator had sent may still be on its way:
so it looks again for a while. One guard a VM at a time: the next one arms itself when this one has gone, so
that it never thaws what another coordinator has frozen.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import syslog
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from clients.coordinator import domains
from clients.coordinator.errors import CoordinatorError, DomainNotFound, NotQuiet

_ARM_TIMEOUT_S = 15.0
_LOOK_AGAIN_S = 2.0
_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class Guard:
    """The coordinator's side of an armed guard."""

    def __init__(self, uri: str, uuid: str, max_freeze_s: float) -> None:
        """Start the process; it arms itself in the background (see wait_armed())."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "clients.coordinator.guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self._said: list[str] = []
        self._tell(json.dumps({"uri": uri, "uuid": uuid, "max_freeze_s": max_freeze_s}))

    @property
    def pid(self) -> int:
        """The guard's process id."""
        return self._process.pid

    def wait_armed(self) -> None:
        """Return once the guard watches. Raises NotQuiet when it does not come up: then nothing may be frozen."""
        if not self._hears("armed", _ARM_TIMEOUT_S):
            self._process.kill()
            self._process.wait()
            raise NotQuiet(
                "the thaw guard could not be armed, or another snapshot of this VM is under way; nothing was frozen"
            )

    def freezing(self) -> None:
        """Say that the freeze is sent now: the clock runs. Raises NotQuiet when the guard is dead."""
        self._tell("freezing")

    def pausing(self) -> None:
        """Say that the vCPUs are paused now. Raises NotQuiet when the guard is dead."""
        self._tell("pausing")

    def disarm(self) -> bool:
        """Say that the guest is thawed, and let the guard go; False when it had thawed the guest itself."""
        with contextlib.suppress(NotQuiet):
            self._tell("thawed")
        fired = self._hears("expired", 0.0)
        self.leave()
        return not fired and not self._hears("expired", 0.0)

    def leave(self) -> None:
        """Close our end: an armed guard goes, one that guards a frozen guest thaws it and then goes."""
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def _tell(self, line: str) -> None:
        assert self._process.stdin  # noqa: S101 - Popen made it
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            raise NotQuiet("the thaw guard died; nothing may be frozen without it") from None

    def _hears(self, word: str, timeout_s: float) -> bool:
        """Tell whether the guard has said a word, waiting for it."""
        assert self._process.stdout  # noqa: S101 - Popen made it
        deadline = time.monotonic() + timeout_s
        while word not in self._said:
            wait_s = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], wait_s)[0]:
                return False
            line = self._process.stdout.readline()
            if not line:
                return False
            self._said.append(line.strip())
        return True


@dataclass
class _Watched:
    """What the guard knows."""

    uri: str
    uuid: str
    max_freeze_s: float
    paused: bool = False


def main() -> int:
    """Guard one guest; see the module's text."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    lines = _Lines(sys.stdin.fileno())
    signal.signal(signal.SIGTERM, lambda _number, _frame: lines.end())
    first = lines.next(None)
    if not first:
        return 0
    watched = _Watched(**json.loads(first))
    lock = _lock(watched.uuid)  # until we exit
    domains.find(domains.connect(watched.uri), watched.uuid)
    _say("armed")
    try:
        return _watch(watched, lines)
    finally:
        os.close(lock)


def _watch(watched: _Watched, lines: _Lines) -> int:
    """Wait for the freeze, then for its end; thaw when that does not come."""
    word = lines.next(None)
    if word not in ("freezing", "pausing"):
        return 0
    watched.paused = word == "pausing"
    began = time.monotonic()
    word = lines.next(watched.max_freeze_s)
    if word == "thawed":
        return 0
    expired = word is None
    if expired:
        _say("expired")
    _log(watched, f"{'max-freeze has passed' if expired else 'the coordinator is gone'}: thawing")
    _free(watched, until=max(time.monotonic(), began + watched.max_freeze_s) + _LOOK_AGAIN_S, lines=lines)
    return 0


def _lock(uuid: str) -> int:
    """Wait until no other guard of this machine guards the VM, and return the lock's descriptor."""
    directory = Path("/run/frostgate" if os.geteuid() == 0 else f"{tempfile.gettempdir()}/frostgate-{os.geteuid()}")
    directory.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(directory / f"guard-{uuid}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _free(watched: _Watched, until: float, lines: _Lines) -> None:
    """Thaw until the guest is thawed, and look again until a time; or the VM is gone."""
    tries = 0
    done_before = False
    while True:
        try:
            domain = domains.find(domains.connect(watched.uri), watched.uuid)
            if not domain.isActive():
                return
            done = _free_once(domain, watched)
        except DomainNotFound:
            return
        except (CoordinatorError, libvirt.libvirtError) as error:
            done = False
            if tries % 60 == 10:
                _log(watched, f"cannot be thawed yet: {error}")
        if done and not done_before:
            _log(watched, "runs again")
        done_before = done
        if done and (time.monotonic() > until or lines.saw("thawed")):
            return
        time.sleep(0.2 if done else _RETRY_S[min(tries, len(_RETRY_S) - 1)])
        tries += 1


def _free_once(domain: Any, watched: _Watched) -> bool:
    """Resume or thaw once; tell whether the guest runs now."""
    if watched.paused:
        if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            domain.resume()
        return bool(domain.state()[0] != libvirt.VIR_DOMAIN_PAUSED)
    if domains.agent(domain, "guest-fsfreeze-status", 2) == "thawed":
        return True
    domain.fsThaw()
    return bool(domains.agent(domain, "guest-fsfreeze-status", 2) == "thawed")


class _Lines:
    """Lines from a descriptor, waited for with a deadline."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = b""
        self._ended = False

    def next(self, timeout_s: float | None) -> str | None:
        """Return the next line, "" at the end of the input, None when the time has passed."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if self._ended:
                return ""
            wait_s = 0.5 if deadline is None else min(0.5, max(0.0, deadline - time.monotonic()))
            if select.select([self._descriptor], [], [], wait_s)[0]:
                part = os.read(self._descriptor, 65536)
                self._ended = not part
                self._buffer += part
            elif deadline is not None and time.monotonic() >= deadline:
                return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def saw(self, word: str) -> bool:
        """Tell, without waiting, whether a line came."""
        while (line := self.next(0)) is not None:
            if line == word:
                return True
            if line == "":
                return False
        return False

    def end(self) -> None:
        """Behave as if the input had ended."""
        self._ended = True


def _say(word: str) -> None:
    with contextlib.suppress(OSError):
        print(word, flush=True)


def _log(watched: _Watched, message: str) -> None:
    """Say it where an operator looks, also when the coordinator's terminal is gone."""
    syslog.openlog("frostgate-guard", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_ERR, f"VM {watched.uuid}: {message}")
    with contextlib.suppress(OSError):
        print(f"frostgate guard: VM {watched.uuid}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
