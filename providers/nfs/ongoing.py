"""What this gateway has under way in a pool: reservations and reverts, open, with the locks that are theirs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from providers.nfs import layout, locks, reverting
from providers.nfs.reservation import Reservation, reopen


@dataclass(frozen=True)
class Revert:
    """Volumes that are about to be set back, and what keeps everybody else from them."""

    volumes: frozenset[str]
    held: ExitStack


class Ongoing:
    """Groups that are being made or reverted to, by id. Thread-safe; a group is worked on by one thread at a time."""

    def __init__(self) -> None:
        """Begin with none."""
        self._lock = threading.Lock()
        self._reservations: dict[str, Reservation] = {}
        self._reverts: dict[str, Revert] = {}
        self._turns: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    def reservation(self, group: str) -> Reservation | None:
        """Return what prepare() left open."""
        with self._lock:
            return self._reservations.get(group)

    def keep(self, group: str, reserved: Reservation, lock: locks.Held) -> None:
        """Take over a reservation and the group's lock."""
        reserved.group_lock = lock
        with self._lock:
            self._reservations[group] = reserved

    def cut_reservation(self, root_fd: int, group: str) -> Reservation | None:
        """Return the reservation of a group that was cut, from before a crash too; None when it is settled.

        Raises VolumeChanged, GroupBusy, OSError.
        """
        reserved = self.reservation(group)
        if reserved is None and not layout.is_finished(root_fd, group):
            lock = self.lock(root_fd, group)
            try:
                reserved = reopen(root_fd, group)
            except BaseException:
                lock.close()
                raise
            self.keep(group, reserved, lock)
        return reserved

    def forget(self, group: str) -> None:
        """Close a reservation; what is on the storage stays."""
        with self._lock:
            reserved = self._reservations.pop(group, None)
        if reserved:
            reserved.close()

    def begin_revert(self, root_fd: int, group: str, volumes: Sequence[str]) -> None:
        """Keep VMs from writing to volumes, and other gateways from them and from the group, until end_revert().

        Raises VolumeInUse, GroupBusy, OSError.
        """
        with self._lock:
            if group in self._reverts:
                return
        with ExitStack() as held:
            held.enter_context(self.lock(root_fd, group))
            held.enter_context(locks.volumes(root_fd, volumes, reverting=True))
            held.callback(reverting.unlock, reverting.lock(root_fd, volumes))
            with self._lock:
                self._reverts[group] = Revert(frozenset(volumes), held.pop_all())

    def end_revert(self, group: str) -> None:
        """Let go of what begin_revert() took; fine when there is nothing."""
        with self._lock:
            revert = self._reverts.pop(group, None)
        if revert:
            revert.held.close()

    def volumes_reverting(self) -> frozenset[str]:
        """Return the volumes that this gateway has locked to revert them."""
        with self._lock:
            return frozenset().union(*(revert.volumes for revert in self._reverts.values()))

    def lock(self, root_fd: int, group: str) -> locks.Held:
        """Return the lock of a group, after waiting for a short verb of our own. Raises GroupBusy, OSError."""
        with self._turn(group):
            return locks.group(root_fd, group)

    @contextmanager
    def locked(self, root_fd: int, group: str) -> Iterator[None]:
        """Have a group for one verb. Verbs of our own that are short wait for each other. Raises GroupBusy, OSError."""
        with self._turn(group), locks.group(root_fd, group):
            yield

    @contextmanager
    def describing(self, root_fd: int, group: str) -> Iterator[None]:
        """Have a group to write its record, also during a revert or clone of our own. Raises GroupBusy, OSError."""
        with self._turn(group), locks.within_group(root_fd, group, "describe", is_ours=self._reverts_to(group)):
            yield

    def cloning(self, root_fd: int, group: str) -> locks.Held:
        """Keep a group while a volume is made of it, also during a revert of our own. Raises GroupBusy, OSError."""
        return locks.within_group(root_fd, group, "clone", is_ours=self._reverts_to(group))

    def _reverts_to(self, group: str) -> bool:
        with self._lock:
            return group in self._reverts

    def _turn(self, group: str) -> threading.Lock:
        with self._lock:
            return self._turns.setdefault(group, threading.Lock())

    def close(self) -> None:
        """Let go of everything."""
        for group in list(self._reservations):
            self.forget(group)
        for group in list(self._reverts):
            self.end_revert(group)
