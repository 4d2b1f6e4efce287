"""libvirt domains as we need them: found by name, their disks read from the live XML, their agent asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import libvirt
import libvirt_qemu
from lxml import etree

from clients.coordinator.errors import DomainNotFound, HypervisorUnavailable, StateRefused
from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import volume_pb2

_AGENT_CHANNEL = "org.qemu.guest_agent.0"
_AGENT_TIMEOUT_S = 5


@dataclass(frozen=True)
class Disk:
    """One disk of a domain. `skipped` says why it is no part of snapshots; "" when it is."""

    target: str
    source: volume_pb2.DiskSource
    location: str
    format: str
    skipped: str = ""


def connect(uri: str) -> Any:
    """Return an open connection. Raises HypervisorUnavailable."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    try:
        return libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise HypervisorUnavailable(
            f"libvirt does not answer at {uri}: {error}; is libvirtd running? Another URI: --connect"
        ) from None


def find(connection: Any, name: str) -> Any:
    """Return a domain by name or UUID. Raises DomainNotFound, HypervisorUnavailable."""
    for look_up in (connection.lookupByName, connection.lookupByUUIDString):
        try:
            return look_up(name)
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_INVALID_ARG):
                raise HypervisorUnavailable(f"libvirt: {error}") from None
    raise DomainNotFound(f"libvirt at {connection.getURI()} knows no VM {name!r}; see `virsh list --all`")


def disks(domain: Any) -> list[Disk]:
    """Return the disks of a domain from its live XML (from its definition when it is off)."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True)
    tree = etree.fromstring(domain.XMLDesc(0).encode(), parser)
    return [_disk(element) for element in tree.iterfind("./devices/disk")]


def has_agent(domain: Any) -> bool:
    """Tell whether the guest's agent is connected now. Source: libvirt domain XML, channel target state."""
    tree = etree.fromstring(domain.XMLDesc(0).encode(), etree.XMLParser(resolve_entities=False, no_network=True))
    target = tree.find(f"./devices/channel/target[@name='{_AGENT_CHANNEL}']")
    return target is not None and target.get("state") == "connected"


def agent(domain: Any, command: str, timeout_s: int = _AGENT_TIMEOUT_S) -> Any:
    """Return what a guest agent command answers. Raises libvirt.libvirtError."""
    return json.loads(libvirt_qemu.qemuAgentCommand(domain, json.dumps({"execute": command}), timeout_s, 0))["return"]


def is_windows(domain: Any) -> bool:
    """Tell whether the guest is Windows, whose freeze is VSS; False when the agent cannot tell."""
    try:
        return bool(agent(domain, "guest-get-osinfo").get("id") == "mswindows")
    except libvirt.libvirtError:
        return False  # an agent older than 2.10: then Linux rules, the weaker claim, hold


def freeze_states(connection: Any) -> Iterator[tuple[str, str]]:
    """Yield name and "frozen", "thawed" or why it is not known, of every running domain."""
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING):
        try:
            if not has_agent(domain):
                yield domain.name(), "has no agent: it can be snapshotted only with --quiesce preferred or none"
                continue
            yield domain.name(), str(agent(domain, "guest-fsfreeze-status", 2))
        except libvirt.libvirtError as error:
            yield domain.name(), f"its agent does not answer: {error}"


def attachment(domain: Any) -> pb.VolumeAttachment | None:
    """Return where a domain runs, for storages that have its hypervisor cut; None when it is off."""
    try:
        if not domain.isActive():
            return None
        return pb.VolumeAttachment(hypervisor=domain.connect().getHostname(), domain=domain.UUIDString())
    except libvirt.libvirtError as error:
        raise HypervisorUnavailable(f"libvirt: {error}") from None


def state(domain: Any) -> tuple[int, int]:
    """Return libvirt's state and reason. Raises StateRefused when the domain is gone."""
    try:
        found = domain.state()
    except libvirt.libvirtError as error:
        raise StateRefused(f"VM {domain.name()}: {error}") from None
    return found[0], found[1]


def _disk(element: Any) -> Disk:
    target = element.find("target")
    driver = element.find("driver")
    source = element.find("source")
    name = target.get("dev", "") if target is not None else ""
    image_format = driver.get("type", "") if driver is not None else ""
    found, location = _source(source)
    skipped = ""
    if element.get("device", "disk") in ("cdrom", "floppy"):
        skipped = f"is a {element.get('device')}"
    elif element.find("readonly") is not None:
        skipped = "is read-only"
    elif element.find("transient") is not None:
        skipped = "is transient"
    elif not location:
        skipped = "has no medium" if source is None else ""
    return Disk(name, found, location, image_format, skipped)


def _source(element: Any) -> tuple[volume_pb2.DiskSource, str]:
    found = volume_pb2.DiskSource()
    if element is None:
        return found, ""
    if path := element.get("file"):
        found.file = path
        return found, path
    if path := element.get("dev"):
        found.block_device = path
        return found, path
    if element.get("protocol") == "rbd":
        found.rbd.name = element.get("name", "")
        for host in element.iterfind("host"):
            port = host.get("port")
            found.rbd.monitors.append(f"{host.get('name')}:{port}" if port else host.get("name", ""))
        return found, f"rbd:{found.rbd.name}"
    return found, element.get("protocol") or element.get("volume") or "a source of another kind"
