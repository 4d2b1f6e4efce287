"""A raw local member, 1 GiB: our mount beside `qemu-storage-daemon --export type=fuse` of the same file.

Read in order, cold; 4 KiB at random by fio, 1 and 16 jobs, once cold and once with the file in the page cache. "bound"
is what root has (the file itself, by a bind mount), "by FUSE" what everybody else has. All in turn in every round, each
time another one first (who comes later finds the blocks in caches below this machine), in one session, so that the
scheduler's groups favour nobody; medians. Beside the rates of 4 KiB reads: the server's
processor time for each, which a busy machine disturbs less.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.gateway_process import FROSTGATE, GatewayProcess
from tests.lab import state
from tests.lab.filesystems import mount_filesystem, unmount

MIB = 1 << 20
SIZE = 1024 * MIB
ROUNDS = 3
FIO_S = 3
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print."""
    lab = state.prepare()
    try:
        with mount_filesystem("xfs", lab / "bench-raw", 4096 * MIB) as filesystem:
            pool = filesystem.directory
            image = pool / "a.raw"
            with image.open("wb") as file:
                for _ in range(SIZE // MIB):
                    file.write(os.urandom(MIB))
            with GatewayProcess(
                Path(tempfile.mkdtemp(prefix="bench-gateway-")), {"p": {"kind": "nfs", "root": str(pool)}}
            ) as gateway:
                gateway.cli("snapshot", "create", "s", "p/a.raw", check=True)
                member = pool / ".frostgate" / "s" / "a.raw"
                with (
                    exported(member, lab / "bench-q") as peer,
                    mounted(gateway, lab / "bench-m") as bound,
                    mounted(gateway, lab / "bench-u") as by_fuse,
                ):
                    unmount(by_fuse[1])
                    report(member, {"peer": peer, "bound": bound, "FUSE": by_fuse})
    finally:
        state.release()


@contextmanager
def mounted(gateway: GatewayProcess, directory: Path) -> Iterator[tuple[int, Path]]:
    """Yield our mount in the foreground: its process and the disk."""
    directory.mkdir(exist_ok=True)
    words = [FROSTGATE, "mount", "--foreground", "s", directory]
    process = subprocess.Popen(words, env=gateway.environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert "mounted" in process.stdout.readline()
    try:
        yield process.pid, next((directory / "disks").iterdir())
    finally:
        process.terminate()
        process.wait()


@contextmanager
def exported(image: Path, place: Path) -> Iterator[tuple[int, Path]]:
    """Yield the peer's export: its process and the file."""
    place.touch()
    process = subprocess.Popen(
        [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=file,filename={image},read-only=on,locking=off"),
            *("--blockdev", "driver=raw,node-name=disk,file=file,read-only=on"),
            *("--export", f"type=fuse,id=e,node-name=disk,mountpoint={place}"),
        ]
    )
    try:
        while not os.path.ismount(place):
            time.sleep(0.05)
        yield process.pid, place
    finally:
        process.terminate()
        process.wait()


def report(member: Path, places: dict[str, tuple[int, Path]]) -> None:
    """Measure all of them and print."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    cost: dict[tuple[str, str], list[float]] = defaultdict(list)
    names = list(places)
    for turn in range(ROUNDS):
        order = [names[(turn + step) % len(names)] for step in range(len(names))]
        for name in order:
            found["in order, cold, MiB/s", name].append(in_order(places[name][1]))
        for warm in (False, True):
            for jobs in (1, 16):
                key = f"4 KiB, {jobs} jobs, {'warm' if warm else 'cold'}, IOPS"
                for name in order:
                    pid, path = places[name]
                    rate, each = at_random(path, jobs, pid, member if warm else None)
                    found[key, name].append(rate)
                    cost[key, name].append(each)
    print(f"{'raw local member':34} {'peer':>8} {'bound':>8} {'/peer':>6} {'FUSE':>8} {'/peer':>6}  CPU us: peer, FUSE")
    for key in dict.fromkeys(key for key, _ in found):
        peer, bound, by_fuse = (statistics.median(found[key, name]) for name in ("peer", "bound", "FUSE"))
        line = f"{key:34} {peer:>8.0f} {bound:>8.0f} {bound / peer:>6.2f} {by_fuse:>8.0f} {by_fuse / peer:>6.2f}"
        if (key, "peer") in cost:
            line += "   " + ", ".join(f"{statistics.median(cost[key, name]):.0f}" for name in ("peer", "FUSE"))
        print(line, flush=True)


def cold() -> None:
    """Empty the page cache."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def in_order(path: Path, size: int = SIZE) -> float:
    """MiB a second of one reader."""
    cold()
    began = time.monotonic()
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"], check=True)
    return size / MIB / (time.monotonic() - began)


def at_random(path: Path, jobs: int, pid: int, warmed: Path | None) -> tuple[float, float]:
    """Return reads a second, and the server's microseconds of processor time for each."""
    cold()
    if warmed:
        subprocess.run(["cat", warmed], stdout=subprocess.DEVNULL, check=True)
    words = ["--name=r", "--readonly", f"--filename={path}", "--rw=randread", "--bs=4k", "--ioengine=psync"]
    words += [f"--numjobs={jobs}", f"--runtime={FIO_S}", "--time_based", "--group_reporting", "--output-format=json"]
    words += ["--norandommap", "--randrepeat=0", "--invalidate=0"]
    before = processor_s(pid)
    told = subprocess.run(["fio", *words], capture_output=True, check=True)
    used = processor_s(pid) - before
    read = json.loads(told.stdout)["jobs"][0]["read"]
    return float(read["iops"]), used / max(1, read["total_ios"]) * 1e6


def processor_s(pid: int) -> float:
    """Return what a process has used of the processors so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


if __name__ == "__main__":
    main()
