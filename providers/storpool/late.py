"""Cuts that the cluster carries out after they were given up.

A request that was not answered in time may still be waiting in the cluster, and nothing can take it back. What it makes
has the word of a reservation that has failed, so it is nobody's: it is looked for a few times in the minutes after, and
removed. What comes later still goes with the next reservation of the id, or with reconcile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from providers.base import ProviderError

log = structlog.get_logger()

_LOOK_AFTER_S = (5.0, 30.0, 120.0, 600.0)


class LateCuts:
    """Looks for late cuts in the background. Thread-safe."""

    def __init__(self, remove: Callable[[str, str], int]) -> None:
        """Take what removes the snapshots of a group's reservation (group, cut) and returns how many there were."""
        self._remove = remove
        self._lock = threading.Lock()
        self._timers: set[threading.Timer] = set()
        self._closed = False

    def expect(self, group: str, cut: str) -> None:
        """Look for what a reservation's cut may still make, a few times from now on."""
        with self._lock:
            if self._closed:
                return
            for delay_s in _LOOK_AFTER_S:
                timer = threading.Timer(delay_s, self._look, (group, cut))
                timer.daemon = True
                self._timers.add(timer)
                timer.start()

    def close(self) -> None:
        """Look no more."""
        with self._lock:
            self._closed = True
            for timer in self._timers:
                timer.cancel()
            self._timers.clear()

    def _look(self, group: str, cut: str) -> None:
        with self._lock:
            self._timers = {timer for timer in self._timers if timer.is_alive() and not timer.finished.is_set()}
            if self._closed:
                return
        try:
            removed = self._remove(group, cut)
        except ProviderError as error:
            log.info("could not look for a late cut", group=group, error=str(error))
        except Exception:  # a thread's edge
            log.exception("could not look for a late cut", group=group)
        else:
            if removed:
                log.info("removed a cut that the cluster carried out late", group=group, snapshots=removed)
