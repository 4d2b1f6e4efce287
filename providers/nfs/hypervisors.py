"""The hypervisors that a pool may ask to cut: connections to libvirt, by the names of an allow-list.

A caller names a host and a domain; the address comes from the pool's configuration only, and what the caller
says of the domain's disk is checked against the live XML. One connection a URI serves all pools of the process.
Calls to a daemon that hangs wait until it goes on or is killed, on the pool's bounded threads: libvirt's keepalive
would end them, but closing a connection in the middle of calls crashes the process with libvirt 9.0. Opening one is
given up after a while. libvirt-python is loaded when a hypervisor is first asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotOpened
from contextlib import contextmanager, suppress
from typing import Any

from lxml import etree

from providers.base import Attachment, CapabilityMissing, DiskSource, PoolUnavailable, VolumeInUse

_OPEN_TIMEOUT_S = 10.0

_lock = threading.Lock()
_connections: dict[str, Future[Any]] = {}
# a broken connection is never freed: libvirt 9.0 may still call back into it from its event loop, and would crash
_broken: list[Future[Any]] = []
_events: threading.Thread | None = None


def load() -> Any:
    """Return the libvirt module, its event loop running. Raises CapabilityMissing."""
    global _events  # noqa: PLW0603 - libvirt has one event loop a process
    try:
        import libvirt
    except ImportError:
        raise CapabilityMissing(
            "backup mode needs libvirt's Python binding (Debian: python3-libvirt, or the extra `vm`)"
        ) from None
    with _lock:
        if _events is None:
            libvirt.registerErrorHandler(lambda _context, _error: None, None)
            libvirt.virEventRegisterDefaultImpl()
            _events = threading.Thread(target=_run_events, args=(libvirt,), name="libvirt-events", daemon=True)
            _events.start()
    return libvirt


def _run_events(libvirt: Any) -> None:
    while True:
        with suppress(libvirt.libvirtError):  # of one round; events of all connections go on
            libvirt.virEventRunDefaultImpl()


def connect(uri: str) -> Any:
    """Return the process's open connection to a URI. Raises PoolUnavailable, CapabilityMissing."""
    libvirt = load()
    with _lock:
        opening = _connections.get(uri)
        if opening is None or _is_broken(opening):
            if opening is not None:
                _broken.append(opening)
            opening = _connections[uri] = Future()
            threading.Thread(target=_open, args=(libvirt, uri, opening), name="libvirt-open", daemon=True).start()
    try:
        return opening.result(_OPEN_TIMEOUT_S)
    except NotOpened:
        raise PoolUnavailable(f"libvirt at {uri} does not answer within {_OPEN_TIMEOUT_S:g} s") from None
    except libvirt.libvirtError as error:
        raise PoolUnavailable(f"libvirt at {uri} does not answer: {error}") from None


def _is_broken(opening: Future[Any]) -> bool:
    if not opening.done():
        return False
    return opening.exception() is not None or not opening.result().isAlive()


def _open(libvirt: Any, uri: str, opening: Future[Any]) -> None:
    """Open a connection; a thread's body, because nothing ends an open() that hangs."""
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        opening.set_exception(error)
    else:
        opening.set_result(connection)


def find(uri: str, uuid: str) -> Any:
    """Return a domain, or None when that hypervisor has none of this UUID. Raises PoolUnavailable."""
    libvirt = load()
    connection = connect(uri)
    try:
        return connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise unavailable(uri, error) from None


def unavailable(uri: str, error: Exception) -> PoolUnavailable:
    """Return the error for a libvirt call that failed."""
    return PoolUnavailable(f"libvirt at {uri}: {error}")


def configured(hypervisors: Mapping[str, str], attachment: Attachment | None) -> str | None:
    """Return the URI of an attachment's hypervisor, or None when the pool's allow-list has none."""
    return None if attachment is None else hypervisors.get(attachment.hypervisor)


def advice(hypervisors: Mapping[str, str], attachment: Attachment | None) -> str:
    """Say what would let a running VM's volume be cut on a file system that cannot clone."""
    if attachment is None:
        return "say which VM has it attached (attachment; `frostgate vm snapshot` does)"
    known = ", ".join(sorted(hypervisors)) or "none"
    return f"add hypervisor {attachment.hypervisor!r} to the pool's `hypervisors` (it has {known})"


def parsed(text: str) -> Any:
    """Return libvirt's XML as an element; nothing outside it is read."""
    return etree.fromstring(text.encode(), etree.XMLParser(resolve_entities=False, no_network=True))


@contextmanager
def errors(uri: str) -> Iterator[None]:
    """Turn what libvirt answers, and nobody expected, into PoolUnavailable."""
    libvirt = load()
    try:
        yield
    except libvirt.libvirtError as error:
        raise unavailable(uri, error) from None


def checked_source(
    tree: Any, attachment: Attachment, volume: str, resolve: Callable[[DiskSource], str | None]
) -> tuple[str, str]:
    """Return path and format of the disk that an attachment names, after finding that it is this very volume.

    `resolve` is the pool's. Raises VolumeInUse when it is not, CapabilityMissing for disks that QEMU cannot back up
    as they are.
    """
    element = next(
        (disk for disk in tree.iterfind("./devices/disk") if _target(disk) == attachment.disk),
        None,
    )
    wrong = {"volume": volume, "domain": attachment.domain, "disk": attachment.disk}
    if element is None:
        raise VolumeInUse(f"volume {volume}: the VM {attachment.domain} has no disk {attachment.disk}", **wrong)
    source = element.find("source")
    path = "" if source is None else source.get("file", "")
    if not path or resolve(DiskSource(file=path)) != volume:
        raise VolumeInUse(
            f"volume {volume} is not disk {attachment.disk} of the VM {attachment.domain}, as the caller says: "
            f"that is {path or 'no file'}",
            **wrong,
        )
    if element.find(".//encryption") is not None:
        raise CapabilityMissing(
            f"volume {volume} is encrypted by QEMU: its running VM's copy would be plain; stop the VM", **wrong
        )
    driver = element.find("driver")
    return path, "raw" if driver is None else driver.get("type", "raw")


def _target(disk: Any) -> str:
    target = disk.find("target")
    return "" if target is None else str(target.get("dev", ""))
