"""LVM2 volume groups over disk images, by the real tools, and content in their volumes without the device mapper.

The lab's kernel has none: LVM's own `activation = 0` lets it write metadata alone, and where the bytes of a volume lie
is asked of `lvs`. So neither the metadata nor its meaning is ours.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab.loops import attached

EXTENT_BYTES = 1 << 20
_RANGE = re.compile(r"(\S+):(\d+)-(\d+)")


@dataclass(frozen=True)
class VolumeGroup:
    """A volume group under construction, its disks on loop devices."""

    name: str
    devices: tuple[str, ...]

    def create(self, volume: str, size_bytes: int, stripes: int = 1) -> None:
        """Make a logical volume: linear, or striped by 64 KiB."""
        how = ["-i", str(stripes), "-I", "64k"] if stripes > 1 else []
        extents = str(-(-size_bytes // EXTENT_BYTES))
        self.run("lvcreate", "-q", "-an", "-Zn", "-Wn", *how, "-l", extents, "-n", volume, self.name)

    def write(self, volume: str, image: Path) -> None:
        """Write an image into a logical volume, where `lvs` says that its bytes are."""
        first = {
            row["pv_name"]: int(row["pe_start"].rstrip("B")) for row in self._report("pvs", "pv", "pv_name,pe_start")
        }
        fields = "lv_name,seg_start_pe,seg_size_pe,seg_pe_ranges,stripe_size"
        with image.open("rb") as source:
            for segment in self._report("lvs", "seg", fields, "--segments"):
                if segment["lv_name"] != volume:
                    continue
                places = [
                    (m[1], first[m[1]] + int(m[2]) * EXTENT_BYTES) for m in _RANGE.finditer(segment["seg_pe_ranges"])
                ]
                length = int(segment["seg_size_pe"]) * EXTENT_BYTES
                stripe = int(segment["stripe_size"].rstrip("B")) or length
                begin = int(segment["seg_start_pe"]) * EXTENT_BYTES
                self._scatter(source.fileno(), begin, length, stripe, places)

    def run(self, *words: str) -> str:
        """Run one of LVM's tools on these disks only."""
        accepted = ", ".join(f'"a|^{device}$|"' for device in self.devices)
        config = (
            f'devices {{ filter = [ {accepted}, "r|.*|" ] }} global {{ activation = 0 }} '
            "activation { udev_sync = 0 udev_rules = 0 monitoring = 0 }"
        )
        environment = {**os.environ, "LVM_SUPPRESS_FD_WARNINGS": "1"}
        tool, *rest = words
        done = subprocess.run(
            [tool, "--config", config, *rest], check=True, capture_output=True, text=True, env=environment
        )
        return done.stdout

    def _report(self, tool: str, section: str, fields: str, *more: str) -> list[dict[str, str]]:
        words = (
            tool,
            "--reportformat",
            "json",
            "--units",
            "b",
            *more,
            "-o",
            fields,
            self.name if tool == "lvs" else "",
        )
        told = json.loads(self.run(*filter(None, words)))
        rows: list[dict[str, str]] = told["report"][0][section]
        return rows

    @staticmethod
    def _scatter(source: int, begin: int, length: int, stripe: int, places: Sequence[tuple[str, int]]) -> None:
        targets = [(os.open(device, os.O_WRONLY), start) for device, start in places]
        try:
            for at in range(0, length, stripe):
                row, column = divmod(at // stripe, len(targets))
                target, start = targets[column]
                content = os.pread(source, min(stripe, length - at), begin + at)
                for inner in range(0, len(content), EXTENT_BYTES):
                    part = content[inner : inner + EXTENT_BYTES]
                    if part.count(0) != len(part):
                        os.pwrite(target, part, start + row * stripe + inner)
        finally:
            for target, _ in targets:
                os.fsync(target)
                os.close(target)


@contextmanager
def volume_group(name: str, disks: Sequence[Path]) -> Iterator[VolumeGroup]:
    """Make a volume group of new physical volumes; the loop devices are freed at the end, the images stay."""
    with attached(*disks) as devices:
        group = VolumeGroup(name, devices)
        group.run("pvcreate", "-q", *devices)
        group.run("vgcreate", "-q", "-s", f"{EXTENT_BYTES}b", name, *devices)
        yield group
