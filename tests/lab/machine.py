"""The lab guest as a libvirt domain: persistent, booted straight from .lab/guest under TCG.

The guest mounts its disks on /mnt/vda, /mnt/vdb, ... in the order given, answers the guest agent
and, with writer=True, counts on all of them and prints a tick on its serial console after each
round. The console log is the oracle outside the guest and outside libvirt's agent channel:
no ticks, no writes.
"""

import base64
import itertools
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import libvirt
import libvirt_qemu
from lxml import etree

from tests.lab import state
from tests.lab.hypervisor import Hypervisor

_TICK = re.compile(r"^tick (\d+) (\d+\.\d+)\r?$", re.MULTILINE)
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Disk:
    """A disk from a file or a block device; device='cdrom' is on IDE and not seen by the guest."""

    path: Path
    format: Literal["raw", "qcow2"] = "raw"
    readonly: bool = False
    device: Literal["disk", "cdrom"] = "disk"


@dataclass(frozen=True)
class RbdDisk:
    """A Ceph image, opened by QEMU's rbd driver (Debian: qemu-block-extra)."""

    pool: str
    image: str
    monitors: tuple[tuple[str, int], ...] = ()
    config_file: Path | None = None


@dataclass(frozen=True)
class Tick:
    """One round of the guest's writer: the number is on every disk by then."""

    number: int
    uptime_s: float


class Machine:
    """One guest. Defined by start(), gone after undefine(); safe to use from a `finally`."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        name: str,
        disks: Sequence[Disk | RbdDisk],
        *,
        memory_mib: int = 256,
        writer: bool = True,
        hook: bool = False,
        agent: bool = True,
        cache: str = "none",
        console_log: Path | None = None,
    ) -> None:
        self.hypervisor = hypervisor
        self.name = name
        self.disks = tuple(disks)
        self.memory_mib = memory_mib
        self.writer = writer
        self.hook = hook
        self.agent = agent
        self.cache = cache
        self.console_log = console_log or hypervisor.directory / "log" / f"{name}.console"

    @property
    def domain(self) -> libvirt.virDomain:
        """The domain, over the hypervisor's present connection."""
        return self.hypervisor.connect().lookupByName(self.name)

    def define(self) -> libvirt.virDomain:
        """Make the domain known to libvirt without starting it. Repeatable."""
        return self.hypervisor.connect().defineXML(self.xml())

    def start(self) -> None:
        """Define and boot; returns while the guest boots."""
        self.define().create()

    def destroy(self) -> None:
        """Pull the plug. Harmless when it does not run or does not exist."""
        domain = self._find()
        if domain is not None and domain.isActive():
            domain.destroy()

    def undefine(self) -> None:
        """Destroy and forget the domain with its libvirt metadata. Repeatable."""
        self.destroy()
        domain = self._find()
        if domain is not None:
            domain.undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            )

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Boot, and wait until the agent (if any) answers and the writer (if any) writes; undefined at the end."""
        try:
            self.start()
            if self.agent:
                self.wait_agent()
            else:
                self.wait_booted()
            if self.writer:
                self.wait_tick()
            yield self
        finally:
            self.undefine()

    def wait_agent(self, timeout_s: float = 60.0) -> float:
        """Wait until the guest agent answers; returns how long that took."""
        began = time.monotonic()
        while True:
            try:
                self.agent_command("guest-ping", timeout_s=2)
                return time.monotonic() - began
            except libvirt.libvirtError as error:
                if time.monotonic() - began > timeout_s:
                    said = self.console()[-500:]
                    raise TimeoutError(f"{self.name}: no agent ({error}); console: {said}") from None
            time.sleep(0.05)

    def wait_booted(self, timeout_s: float = 60.0) -> None:
        """Wait until the disks are mounted, by the console; for guests without an agent."""
        deadline = time.monotonic() + timeout_s
        while "\nbooted " not in self.console():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} did not boot; console: {self.console()[-500:]}")
            time.sleep(0.05)

    def wait_off(self, timeout_s: float = 30.0) -> None:
        """Wait until the guest has shut itself down."""
        deadline = time.monotonic() + timeout_s
        while self.domain.isActive():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} still runs; console: {self.console()[-500:]}")
            time.sleep(0.05)

    def console(self) -> str:
        """Everything that the serial console ever said, over all boots."""
        try:
            return self.console_log.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def ticks(self) -> list[Tick]:
        """Every tick so far, over all boots."""
        return _parse_ticks(self.console())

    def last_tick(self) -> Tick | None:
        """The newest tick; reads only the end of the log."""
        try:
            with self.console_log.open("rb") as file:
                file.seek(max(0, self.console_log.stat().st_size - _TAIL_BYTES))
                recent = _parse_ticks(file.read().decode(errors="replace"))
        except FileNotFoundError:
            return None
        return recent[-1] if recent else None

    def wait_tick(self, beyond: int = 0, timeout_s: float = 60.0) -> Tick:
        """Wait for a tick with a number greater than beyond."""
        deadline = time.monotonic() + timeout_s
        while True:
            tick = self.last_tick()
            if tick is not None and tick.number > beyond:
                return tick
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: last tick {tick}, waited for one beyond {beyond}")
            time.sleep(0.02)

    def agent_command(self, name: str, arguments: object = None, timeout_s: int = 10) -> object:
        """One guest agent command's return value."""
        command: dict[str, object] = {"execute": name}
        if arguments is not None:
            command["arguments"] = arguments
        answer = libvirt_qemu.qemuAgentCommand(self.domain, json.dumps(command), timeout_s, 0)
        result: object = json.loads(answer)["return"]
        return result

    def fsfreeze_status(self) -> str:
        """'thawed' or 'frozen', by the agent's own account."""
        return str(self.agent_command("guest-fsfreeze-status"))

    def exec(self, command: Sequence[str], timeout_s: float = 30.0) -> tuple[int, str]:
        """Run a program in the guest; returns its exit code and output (stderr after stdout)."""
        started = _mapping(
            self.agent_command("guest-exec", {"path": command[0], "arg": list(command[1:]), "capture-output": True})
        )
        deadline = time.monotonic() + timeout_s
        while True:
            status = _mapping(self.agent_command("guest-exec-status", {"pid": started["pid"]}))
            if status["exited"]:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: {command} still runs")
            time.sleep(0.02)
        output = b"".join(base64.b64decode(str(status.get(key, ""))) for key in ("out-data", "err-data"))
        # a process ended by a signal has no exit code
        code = status.get("exitcode", -1)
        return (code if isinstance(code, int) else -1), output.decode(errors="replace")

    def write_file(self, path: str, content: bytes) -> None:
        """Write a file in the guest through the agent; in its page cache, not synced."""
        handle = self.agent_command("guest-file-open", {"path": path, "mode": "w"})
        try:
            for start in range(0, len(content), 1 << 20):
                chunk = base64.b64encode(content[start : start + (1 << 20)]).decode()
                self.agent_command("guest-file-write", {"handle": handle, "buf-b64": chunk})
        finally:
            self.agent_command("guest-file-close", {"handle": handle})

    def read_file(self, path: str) -> bytes:
        """Read a whole file in the guest through the agent."""
        handle = self.agent_command("guest-file-open", {"path": path, "mode": "r"})
        content = b""
        try:
            while True:
                part = _mapping(self.agent_command("guest-file-read", {"handle": handle, "count": 1 << 20}))
                content += base64.b64decode(str(part["buf-b64"]))
                if part["eof"]:
                    return content
        finally:
            self.agent_command("guest-file-close", {"handle": handle})

    def xml(self) -> str:
        """The domain as start() defines it."""
        kernel, initrd = state.guest_image()
        root = etree.Element("domain", type="qemu")
        _child(root, "name", self.name)
        _child(root, "memory", str(self.memory_mib), unit="MiB")
        _child(root, "vcpu", "1")
        system = _child(root, "os")
        _child(system, "type", "hvm", arch="x86_64", machine="pc")
        _child(system, "kernel", str(kernel))
        _child(system, "initrd", str(initrd))
        _child(system, "cmdline", self._kernel_command_line())
        _child(_child(root, "features"), "acpi")
        _child(root, "on_poweroff", "destroy")
        _child(root, "on_reboot", "restart")
        _child(root, "on_crash", "destroy")
        devices = _child(root, "devices")
        _child(devices, "emulator", "/usr/bin/qemu-system-x86_64")
        names = {
            "disk": iter(f"vd{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
            "cdrom": iter(("hda", "hdb")),
        }
        for disk in self.disks:
            device = disk.device if isinstance(disk, Disk) else "disk"
            self._add_disk(devices, disk, device, next(names[device]))
        serial = _child(devices, "serial", type="file")
        _child(serial, "source", path=str(self.console_log), append="on")
        _child(serial, "target", port="0")
        channel = _child(devices, "channel", type="unix")
        _child(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
        _child(devices, "controller", type="usb", model="none")
        _child(devices, "memballoon", model="none")
        return etree.tostring(root, pretty_print=True, encoding="unicode")

    def _add_disk(self, devices: etree._Element, disk: Disk | RbdDisk, device: str, target: str) -> None:
        if isinstance(disk, RbdDisk):
            element = _child(devices, "disk", type="network", device=device)
            _child(element, "driver", name="qemu", type="raw", cache=self.cache)
            source = _child(element, "source", protocol="rbd", name=f"{disk.pool}/{disk.image}")
            for host, port in disk.monitors:
                _child(source, "host", name=host, port=str(port))
            if disk.config_file is not None:
                _child(source, "config", file=str(disk.config_file))
        else:
            is_block = disk.path.is_block_device()
            element = _child(devices, "disk", type="block" if is_block else "file", device=device)
            cache = self.cache if device == "disk" else "writeback"
            _child(element, "driver", name="qemu", type=disk.format, cache=cache)
            source = _child(element, "source")
            source.set("dev" if is_block else "file", str(disk.path))
            if disk.readonly or device == "cdrom":
                _child(element, "readonly")
        _child(element, "target", dev=target, bus="virtio" if device == "disk" else "ide")

    def _kernel_command_line(self) -> str:
        # one CPU under TCG: mitigations and watchdogs only cost time; a crash must end the guest
        words = ["console=ttyS0", "quiet", "mitigations=off", "nowatchdog", "panic=-1"]
        words += [f"frostgate.{name}=1" for name in ("writer", "hook") if getattr(self, name)]
        words += [] if self.agent else ["frostgate.noagent=1"]
        return " ".join(words)

    def _find(self) -> libvirt.virDomain | None:
        try:
            return self.domain
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise


def longest_pause_s(ticks: Iterable[Tick]) -> float:
    """The longest time between two rounds, by the guest's clock: how long it was frozen, at most.

    A reboot sets the clock back; that gap does not count.
    """
    times = [tick.uptime_s for tick in ticks]
    return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


def _parse_ticks(text: str) -> list[Tick]:
    complete = text[: text.rfind("\n") + 1]
    return [Tick(int(match[1]), float(match[2])) for match in _TICK.finditer(complete)]


def _child(parent: etree._Element, tag: str, text: str | None = None, /, **attributes: str) -> etree._Element:
    element = etree.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _mapping(answer: object) -> dict[str, object]:
    if not isinstance(answer, dict):
        raise TypeError(f"the agent answered {answer!r}")
    return answer
