"""`find` and `tar` over 5,000 files on ext4, cold: our mount, the kernel's own and guestmount in one run.

Ours and the kernel's take turns in being first: who comes later finds the blocks in caches below this machine.
"""

import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from tests.gateway_process import GatewayProcess
from tests.lab import state
from tests.lab.filesystems import mount_filesystem, unmount
from tests.lab.guestmount import environment, guestmounted
from tests.lab.images import make_image, mount_image

MIB = 1 << 20
ROUNDS = 6


def _timed(root: Path) -> float:
    Path("/proc/sys/vm/drop_caches").write_text("3")
    began = time.monotonic()
    subprocess.run(["find", root], stdout=subprocess.DEVNULL, check=True)
    # tar reads nothing when it sees that its archive is /dev/null
    command = f"tar cf - '{root}' 2>/dev/null | cat > /dev/null"
    subprocess.run(["bash", "-c", command], check=True)
    return time.monotonic() - began


def main() -> None:
    """Measure and print."""
    lab = state.prepare()
    scratch = Path(tempfile.mkdtemp(prefix="bench-mount-"))
    with mount_filesystem("xfs", lab / "bench-mount", 4096 * MIB) as filesystem:
        image = make_image("ext4", filesystem.directory / "a.raw", 1024 * MIB, 5000)
        environment()
        with GatewayProcess(scratch / "gateway", {"p": {"kind": "nfs", "root": str(filesystem.directory)}}) as gateway:
            gateway.cli("snapshot", "create", "s", "p/a.raw", check=True)
            found: dict[str, list[float]] = {"ours": [], "kernel": [], "guestmount": []}

            def by_ours() -> None:
                gateway.cli("mount", "s", scratch / "m", check=True)
                found["ours"].append(_timed(scratch / "m" / "files" / "a.raw" / "whole"))
                gateway.cli("umount", scratch / "m", check=True)

            def by_kernel() -> None:
                (scratch / "k").mkdir(exist_ok=True)
                mount_image("ext4", image, scratch / "k")
                found["kernel"].append(_timed(scratch / "k"))
                unmount(scratch / "k")

            with guestmounted(image, scratch / "g"):  # once: it takes a minute
                found["guestmount"].append(_timed(scratch / "g"))
            for number in range(ROUNDS):
                for read in (by_ours, by_kernel) if number % 2 else (by_kernel, by_ours):
                    read()
            gateway.cli("snapshot", "delete", "s", "--yes", check=True)
    mine, peer, appliance = (statistics.median(found[name]) for name in ("ours", "kernel", "guestmount"))
    print(f"find and tar of 5,000 files on ext4, cold, seconds, medians of {ROUNDS} rounds")
    print(f"  kernel's loop mount {peer:6.2f}")
    print(f"     guestmount (TCG) {appliance:6.2f}")
    print(f"                 ours {mine:6.2f}  ours/kernel {mine / peer:.1f}  guestmount/ours {appliance / mine:.1f}")
    state.release()


if __name__ == "__main__":
    main()
