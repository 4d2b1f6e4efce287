"""Making a VM quiet for the cut, and knowing that it was: each way as one context.

A window is entered just before the cut and left just after it. Leaving it thaws, whatever happened inside, and
`verified` then tells whether the VM was quiet through the cut.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import libvirt

from clients.coordinator import domains
from clients.coordinator.errors import NotQuiet, StateRefused, StillFrozen
from clients.coordinator.guard import Guard
from frostgate.v1 import group_snapshot_pb2 as pb

_THAW_TRIES = 5


class Quiesce(StrEnum):
    """How much quiet the caller asks for."""

    REQUIRED = "required"
    PREFERRED = "preferred"
    NONE = "none"


class Way(StrEnum):
    """How a VM is made quiet."""

    FREEZE = "freeze"
    PAUSE = "pause"
    PAUSED = "is paused"
    OFF = "is off"
    NOTHING = "nothing"


@dataclass
class Window:
    """One freeze window, times in seconds. `verified` is set when it was left."""

    way: Way
    began: float = 0.0
    freeze_s: float = 0.0
    thaw_s: float = 0.0
    window_s: float = 0.0
    frozen: int = 0
    verified: bool = False
    doubt: str = ""


def choose(domain: Any, quiesce: Quiesce) -> Way:
    """Return how a VM will be made quiet.

    Raises NotQuiet when what is required cannot be had, or somebody else has frozen the guest; StateRefused.
    """
    name = domain.name()
    current, _ = domains.state(domain)
    if current == libvirt.VIR_DOMAIN_SHUTOFF:
        return Way.OFF
    if current == libvirt.VIR_DOMAIN_PAUSED:
        return Way.PAUSED
    if current != libvirt.VIR_DOMAIN_RUNNING:
        raise StateRefused(f"VM {name} is neither running, paused nor off; try again when it is")
    if quiesce is Quiesce.NONE:
        return Way.NOTHING
    doubt = "its guest agent is not connected"
    if domains.has_agent(domain):
        try:
            if domains.agent(domain, "guest-fsfreeze-status") == "frozen":
                raise NotQuiet(
                    f"VM {name} is frozen already, by somebody else; `frostgate vm thaw {name}` if it is stuck"
                )
        except libvirt.libvirtError as error:
            doubt = f"its guest agent does not answer ({error})"
        else:
            return Way.FREEZE
    if quiesce is Quiesce.PREFERRED:
        return Way.PAUSE
    raise NotQuiet(f"VM {name} cannot be frozen: {doubt}; --quiesce preferred pauses it instead")


@contextmanager
def window(domain: Any, way: Way, guard: Guard | None, max_freeze_s: float) -> Iterator[Window]:
    """Make a VM quiet, yield, and let it go again.

    Raises NotQuiet when it cannot be made quiet, StillFrozen when it could not be thawed by us (the guard goes on).
    """
    opened = Window(way, began=time.monotonic())
    if way is Way.FREEZE and guard:
        yield from _frozen(domain, guard, opened, max_freeze_s)
    elif way is Way.PAUSE and guard:
        yield from _paused(domain, guard, opened)
    else:
        before = domains.state(domain)
        yield opened
        opened.verified = way is Way.NOTHING or domains.state(domain) == before
        opened.doubt = "" if opened.verified else "the VM was started or resumed meanwhile"


def _frozen(domain: Any, guard: Guard, opened: Window, max_freeze_s: float) -> Iterator[Window]:
    name = domain.name()
    domain.agentSetResponseTimeout(max(1, round(max_freeze_s)))  # a hung agent must not hold our thaw off
    guard.freezing()
    opened.began = time.monotonic()
    try:
        try:
            opened.frozen = domain.fsFreeze()
        except libvirt.libvirtError as error:
            raise NotQuiet(f"VM {name} could not be frozen: {error}") from None
        opened.freeze_s = time.monotonic() - opened.began
        if not opened.frozen:
            raise NotQuiet(f"VM {name}: its agent froze no file system; --quiesce preferred pauses a VM without agent")
        yield opened
        opened.verified = True  # unless _thaw() finds otherwise
    finally:
        _thaw(domain, guard, opened)


def _thaw(domain: Any, guard: Guard, opened: Window) -> None:
    """Thaw, as often as it takes; then disarm. When we cannot, the guard stays armed and is told by our leaving.

    How many file systems the agent thaws is how many still were frozen after the cut: on Linux the kernel refuses
    to thaw one that is not (FITHAW), on Windows the agent fails when VSS gave up. So this is the check as well,
    and it costs no round trip while the guest is frozen.
    """
    begin = time.monotonic()
    thawed = -1
    failure: Exception | None = None
    for attempt in range(_THAW_TRIES):
        try:
            thawed = domain.fsThaw()
            break
        except libvirt.libvirtError as error:
            failure = error
            opened.verified = False
            opened.doubt = f"thawing failed: {error}"
            time.sleep(0.05 * 2**attempt)
    if thawed < 0:
        guard.leave()
        if not domain.isActive():
            return
        raise StillFrozen(
            f"VM {domain.name()} could not be thawed: {failure}. The guard goes on trying (syslog); "
            f"see `frostgate vm thaw {domain.name()}`"
        )
    opened.thaw_s = time.monotonic() - begin
    opened.window_s = time.monotonic() - opened.began
    if thawed < opened.frozen:
        opened.verified = False
        opened.doubt = f"{opened.frozen} file systems were frozen but only {thawed} still were when the cut was done"
    if not guard.disarm():
        opened.verified = False
        opened.doubt = "max-freeze passed before the cut was done, and the guard thawed the guest"


def _paused(domain: Any, guard: Guard, opened: Window) -> Iterator[Window]:
    guard.pausing()
    opened.began = time.monotonic()
    try:
        try:
            domain.suspend()  # flushes the disks as well
        except libvirt.libvirtError as error:
            raise NotQuiet(f"VM {domain.name()} could not be paused: {error}") from None
        opened.freeze_s = time.monotonic() - opened.began
        yield opened
        opened.verified = domains.state(domain)[0] == libvirt.VIR_DOMAIN_PAUSED
        opened.doubt = "" if opened.verified else "the VM was resumed before the cut was done"
    finally:
        _resume(domain, guard, opened)


def _resume(domain: Any, guard: Guard, opened: Window) -> None:
    begin = time.monotonic()
    try:
        if domains.state(domain)[0] == libvirt.VIR_DOMAIN_PAUSED:
            domain.resume()
    except libvirt.libvirtError as error:
        guard.leave()
        raise StillFrozen(f"VM {domain.name()} could not be resumed: {error}. The guard goes on trying") from None
    opened.thaw_s = time.monotonic() - begin
    opened.window_s = time.monotonic() - opened.began
    if not guard.disarm():
        opened.verified = False
        opened.doubt = "max-freeze passed before the cut was done, and the guard resumed the VM"


def worth(way: Way, reason: int, *, windows: bool) -> pb.Consistency.ValueType:
    """Return what a verified cut is worth. `reason` is libvirt's for the state before the cut."""
    if way is Way.FREEZE:
        return pb.CONSISTENCY_APPLICATION if windows else pb.CONSISTENCY_FILESYSTEM
    if way is Way.OFF and reason == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN:
        return pb.CONSISTENCY_FILESYSTEM
    return pb.CONSISTENCY_CRASH
