"""Setting a VM back to a snapshot: stopped first, started again if it ran."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import libvirt

from clients.coordinator import domains
from clients.coordinator.errors import DomainNotFound, StateRefused


@contextmanager
def stopped(uri: str, uuid: str, *, stop: bool, shutdown_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """Keep a VM off inside the context; it is started again afterwards if it ran, whatever happened.

    A VM that libvirt does not know (any more) is fine. The guest is asked to shut down, and after `shutdown_s`
    turned off: its disks are about to be replaced, and their present state is kept. Raises StateRefused when it
    runs and `stop` is false, CoordinatorError.
    """
    try:
        domain = domains.find(domains.connect(uri), uuid)
    except DomainNotFound:
        yield
        return
    if not domain.isActive():
        yield
        return
    name = domain.name()
    if not stop:
        raise StateRefused(f"VM {name} runs; stop it first, or say --stop")
    if not domain.isPersistent():
        raise StateRefused(f"VM {name} is transient: once stopped it could not be started again; stop it yourself")
    say(f"stopping {name}")
    _stop(domain, shutdown_s)
    try:
        yield
    finally:
        say(f"starting {name}")
        try:
            domain.create()
        except libvirt.libvirtError as error:
            raise StateRefused(f"VM {name} could not be started again: {error}") from None


def _stop(domain: Any, shutdown_s: float) -> None:
    deadline = time.monotonic() + shutdown_s
    try:
        domain.shutdown()
        while domain.isActive() and time.monotonic() < deadline:
            time.sleep(0.1)
    except libvirt.libvirtError:
        pass  # a guest that cannot be asked is turned off below
    try:
        if domain.isActive():
            domain.destroy()
    except libvirt.libvirtError as error:
        if domain.isActive():
            raise StateRefused(f"VM {domain.name()} could not be stopped: {error}") from None
