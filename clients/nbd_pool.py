"""Connections to one NBD export, made when they are needed, at most MOST of them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from clients.nbd import Connection

MOST = 16


class Connections:
    """A pool of connections. Thread-safe."""

    def __init__(self, path: str, name: str, check: Callable[[], None]) -> None:
        """Take where to connect to, and what a new connection has to pass; nothing is opened yet."""
        self._check = check
        self._path = path
        self._name = name
        self._idle: list[Connection] = []
        self._made = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self) -> Connection:
        """Return a connection for one request, waited for when all are busy.

        Raises Away, OSError, also what the check of a new one raises.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._idle or self._made < MOST)
            if self._idle:
                return self._idle.pop()
            self._made += 1
        try:
            connection = Connection(self._path, self._name)
        except BaseException:
            self._forget()
            raise
        try:
            self._check()
        except BaseException:
            self.drop(connection)
            raise
        return connection

    def take_idle(self) -> Connection | None:
        """Return a connection that is there and free, or None."""
        with self._changed:
            return self._idle.pop() if self._idle else None

    def give(self, connection: Connection) -> None:
        """Give one back that has answered."""
        with self._changed:
            if not self._closed:
                self._idle.append(connection)
                self._changed.notify()
                return
        self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """Give one back that cannot be used any more."""
        connection.close()
        self._forget()

    def hang_up(self) -> None:
        """Close those that are free: when one broke, they are likely to be broken too."""
        while connection := self.take_idle():
            self.drop(connection)

    def close(self) -> None:
        """Close all, those in use when they come back."""
        with self._changed:
            self._closed = True
        self.hang_up()

    def _forget(self) -> None:
        with self._changed:
            self._made -= 1
            self._changed.notify()
