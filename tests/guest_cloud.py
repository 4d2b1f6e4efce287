"""A gateway, a libvirtd and the guest web1 whose disks are the gateway's volumes: what every cloud of the tests has."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gateway_process import GatewayProcess
from tests.lab.disk import read_counter
from tests.lab.hypervisor import Hypervisor
from tests.lab.machine import Machine


@dataclass(frozen=True)
class GuestCloud:
    """The storages add what they have besides."""

    gateway: GatewayProcess
    hypervisor: Hypervisor
    machine: Machine

    def vm(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `frostgate vm ...`."""
        return self.gateway.cli("vm", *words, env={"LIBVIRT_DEFAULT_URI": self.hypervisor.uri})

    def snapshot(self, *words: str) -> dict[str, Any]:
        """Run `frostgate vm snapshot`, and return the group snapshot as its JSON has it."""
        done = self.vm("snapshot", self.machine.name, *words, "--output", "json")
        assert done.returncode == 0, done.stderr
        taken: dict[str, Any] = json.loads(done.stdout)["group_snapshot"]
        return taken

    def counters_in(self, taken: dict[str, Any], directory: Path) -> list[int]:
        """What the guest had counted to on each disk, by the members as they are read from the gateway."""
        found = []
        for member in taken["members"]:
            name = "{pool}/{volume}".format_map(member["volume"])
            target = directory / name.replace("/", "-")
            done = self.gateway.cli("snapshot", "read", taken["id"], name, "--to", target)
            assert done.returncode == 0, done.stderr
            found.append(read_counter(target))
        return found

    def write_note(self, content: bytes, *disks: str) -> None:
        """Have the guest write a file to these of its disks, for good."""
        for disk in disks:
            self.machine.write_file(f"/mnt/{disk}/note", content)
        self.machine.exec(["/bin/sh", "-c", "sync"])

    def notes(self, *disks: str) -> list[bytes]:
        """What the guest has there now."""
        return [self.machine.read_file(f"/mnt/{disk}/note") for disk in disks]
