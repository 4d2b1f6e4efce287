"""`make demo`: a running VM snapshotted while it writes, damaged, reverted, and found whole. All of it real."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.gateway_process import GatewayProcess
from tests.lab import leftovers, state
from tests.lab.disk import create_disk, read_counter
from tests.lab.filesystems import mount_filesystem
from tests.lab.hypervisor import Hypervisor
from tests.lab.machine import Disk, Machine

GIB = 1 << 30
STATE_DIR = state.DEFAULT_STATE_DIR
VM = "web1"
NOTE = "/mnt/vda/note"
WHOLE = b"the only copy of something important\n"


def main() -> int:
    """Run the demo and clean up, also after Ctrl-C."""
    leftovers.remove(STATE_DIR)  # of a demo that was killed
    began = time.monotonic()
    directory = state.prepare(STATE_DIR)
    try:
        run(directory)
    except KeyboardInterrupt:
        print("\ninterrupted; cleaning up")
        return 130
    finally:
        shutil.rmtree(directory / "demo", ignore_errors=True)
        state.release(STATE_DIR)
        left = leftovers.remove(STATE_DIR)
    if left:
        print(f"left behind: {left}", file=sys.stderr)
        return 1
    print(f"\nDone in {time.monotonic() - began:.0f} s. Nothing is left behind.")
    return 0


def run(directory: Path) -> None:
    with (
        step("an XFS file system for the pool") as done,
        mount_filesystem("xfs", directory / "demo-pool", 4 * GIB) as pool,
        GatewayProcess(directory / "demo", {"fast": {"kind": "nfs", "root": str(pool.directory)}}) as gateway,
        Hypervisor(STATE_DIR, "demo-hypervisor") as hypervisor,
    ):
        done(f"mounted, gateway at {gateway.address.rpartition('/')[2]}, libvirtd started")
        disks = [Disk(create_disk(pool.directory / f"{VM}-{letter}.raw", GIB, "ext4")) for letter in "ab"]
        machine = Machine(hypervisor, VM, disks, writer=True, hook=True)
        try:
            snapshot_and_revert(gateway, hypervisor, machine, pool.directory)
        finally:
            machine.undefine()


def snapshot_and_revert(gateway: GatewayProcess, hypervisor: Hypervisor, machine: Machine, pool: Path) -> None:
    with step("boot a guest with two disks that writes a counter to both, synced, without pause") as done:
        machine.start()
        machine.wait_agent()
        machine.write_file(NOTE, WHOLE)
        machine.exec(["/bin/sh", "-c", "sync"])
        done(f"it has written {machine.wait_tick(20).number} rounds")

    with step("frostgate vm snapshot web1") as done:
        taken = json.loads(frostgate(gateway, hypervisor, "vm", "snapshot", VM, "--output", "json"))
        snapshot, window = taken["group_snapshot"], taken["window"]
        cut_ms = float(snapshot["cut_duration"].rstrip("s")) * 1000
        done(
            f"{snapshot['id']}: {snapshot['consistency']}, frozen for {window['window_s'] * 1000:.0f} ms "
            f"(freeze {window['freeze_s'] * 1000:.0f}, cut {cut_ms:.1f}, thaw {window['thaw_s'] * 1000:.0f})"
        )
    with step("mount both members with the kernel: do they hold the same counter?") as done:
        counters = [read_counter(Path(member["local_path"])) for member in snapshot["members"]]
        if len(set(counters)) != 1:
            raise AssertionError(f"the members differ: {counters}")
        done(f"yes, {counters[0]} and {counters[1]}; the guest has gone on to {machine.wait_tick(counters[0]).number}")

    with step("the guest damages its file") as done:
        machine.write_file(NOTE, b"oops\n")
        machine.exec(["/bin/sh", "-c", "sync"])
        done(f"{NOTE} now says {machine.read_file(NOTE)!r}")

    with step("frostgate vm revert web1 --stop") as done:
        options = ("--stop", "--shutdown-timeout", "15", "--yes", "--output", "json")
        reverted = json.loads(frostgate(gateway, hypervisor, "vm", "revert", VM, snapshot["id"], *options))
        safety = reverted["revert"]["safety_id"]
        done(f"stopped, set back, started; the state before is kept as {safety}")
    with step("boot again and look at the file") as done:
        machine.wait_agent()
        found = machine.read_file(NOTE)
        if found != WHOLE:
            raise AssertionError(f"the file is not whole: {found!r}")
        done(f"whole: {found!r}")
    print(frostgate(gateway, hypervisor, "vm", "list", VM))

    with step("frostgate vm delete") as done:
        frostgate(gateway, hypervisor, "vm", "delete", snapshot["id"], safety, "--yes")
        disks = [f"{VM}-a.raw", f"{VM}-b.raw"]
        left = sorted(str(path.relative_to(pool)) for path in pool.rglob("*"))
        if left != [".frostgate", ".frostgate/.lock", *disks]:
            raise AssertionError(f"left in the pool: {left}")
        done(f"in the pool are {', '.join(disks)}, and the lock file that stays")


def frostgate(gateway: GatewayProcess, hypervisor: Hypervisor, *words: str) -> str:
    """Run the command as a user would; what it prints."""
    completed = gateway.cli(*words, env={"LIBVIRT_DEFAULT_URI": hypervisor.uri})
    if completed.returncode:
        raise subprocess.CalledProcessError(completed.returncode, words, completed.stdout, completed.stderr)
    return completed.stdout


@contextmanager
def step(title: str) -> Iterator[Callable[[str], None]]:
    """Say what is being done, and how it came out."""
    print(f"==> {title}", flush=True)
    began = time.monotonic()
    yield lambda outcome: print(f"    {outcome}  [{time.monotonic() - began:.1f} s]", flush=True)


if __name__ == "__main__":
    sys.exit(main())
