"""`python -m tests.lab up|down|status`: the lab by hand, and the broom after a killed test."""

import argparse
import sys
from pathlib import Path

from tests.lab import leftovers, state


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    parser.add_argument("verb", choices=("up", "down", "status"))
    parser.add_argument("--state-dir", type=Path, default=state.DEFAULT_STATE_DIR)
    arguments = parser.parse_args()
    state_dir: Path = arguments.state_dir
    if arguments.verb == "up":
        return up(state_dir)
    if arguments.verb == "down":
        return down(state_dir)
    return status(state_dir)


def up(state_dir: Path) -> int:
    """Start the private libvirtd and leave it running."""
    from tests.lab.hypervisor import Hypervisor  # down must work without python3-libvirt

    state.guest_image()
    hypervisor = Hypervisor(state_dir)
    hypervisor.start()
    print(hypervisor.uri)
    return 0


def down(state_dir: Path) -> int:
    """Remove everything, also of pytest's workers; 1 and a list when something resists."""
    left = [thing for found in state.all_state_dirs(state_dir) for thing in leftovers.remove(found)]
    for thing in left:
        print(f"lab: could not remove {thing}", file=sys.stderr)
    return 1 if left else 0


def status(state_dir: Path) -> int:
    """Say what is there, also of pytest's workers."""
    for found in state.all_state_dirs(state_dir):
        for pid in leftovers.processes(found):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            print(f"process {pid} {command[:100]}")
        for point in leftovers.mounts(found):
            print(f"mount {point}")
        for device in leftovers.loop_devices(found):
            print(f"loop {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
