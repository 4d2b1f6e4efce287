"""libvirt's checkpoints: which clusters of a qcow2 volume changed since a snapshot, kept as bitmaps in the volume.

Ours are named `frostgate.<group>.<8 hex digits>`; others are left alone. Deleting one merges its bitmap into the one
before, so that what another tool tracks stays right. Every function may raise libvirt.libvirtError.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lxml import etree

from providers.nfs import hypervisors

PREFIX = "frostgate."
_OURS = re.compile(r"frostgate\.(?P<group>.+)\.[0-9a-f]{8}")


def description(name: str, targets: Sequence[str]) -> str:
    """Return the XML of a checkpoint of some disks."""
    root = etree.Element("domaincheckpoint")
    etree.SubElement(root, "name").text = name
    listed = etree.SubElement(root, "disks")
    for target in targets:
        etree.SubElement(listed, "disk", name=target, checkpoint="bitmap")
    return etree.tostring(root, encoding="unicode")


def group_of(name: str) -> str | None:
    """Return the group that a checkpoint was made with, None when it is not ours."""
    match = _OURS.fullmatch(name)
    return match["group"] if match else None


def ours(domain: Any) -> list[str]:
    """Return the names of a domain's checkpoints that are ours, newest first."""
    libvirt = hypervisors.load()
    listed = domain.listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
    return [name for name in (one.getName() for one in reversed(listed)) if group_of(name)]


def changed_bytes(domain: Any, name: str, target: str) -> int | None:
    """Return how much of a disk changed since a checkpoint; None when its bitmap is lost or cannot be used."""
    libvirt = hypervisors.load()
    flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE | libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
    try:
        text = domain.checkpointLookupByName(name).getXMLDesc(flags)
    except libvirt.libvirtError as error:
        if error.get_error_code() in lost_codes():
            return None
        raise
    for disk in hypervisors.parsed(text).iterfind("./disks/disk"):
        if disk.get("name") == target and disk.get("checkpoint") == "bitmap" and disk.get("size", "").isdecimal():
            return int(disk.get("size"))
    return None


def can_track(domain: Any) -> bool:
    """Tell whether libvirt makes checkpoints of a domain: it does not beside its own snapshots."""
    return bool(domain.snapshotNum(0) == 0)


def remove(domain: Any, name: str) -> None:
    """Delete a checkpoint; a missing one is fine. Of a VM that is off, or whose bitmaps are lost, only its record."""
    libvirt = hypervisors.load()
    try:
        checkpoint = domain.checkpointLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
            return
        raise
    try:
        checkpoint.delete(0)
    except libvirt.libvirtError:
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


def remove_older(domain: Any, name: str, targets: set[str]) -> None:
    """Delete our checkpoints beside one, whose disks that one has as well."""
    for other in ours(domain):
        if other == name:
            continue
        libvirt = hypervisors.load()
        text = domain.checkpointLookupByName(other).getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN)
        tracked = {
            disk.get("name")
            for disk in hypervisors.parsed(text).iterfind("./disks/disk")
            if disk.get("checkpoint") == "bitmap"
        }
        if tracked <= targets:
            remove(domain, other)


def lost_codes() -> tuple[int, ...]:
    """Return libvirt's error codes for a checkpoint, or the bitmap of one, that is not there or cannot be used."""
    libvirt = hypervisors.load()
    return libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT, libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT
