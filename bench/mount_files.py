"""`find` and `tar` over 5,000 files on ext4, cold: our mount, the kernel's own and guestmount in one run."""

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
ROUNDS = 3


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
            ours, kernel, guestmount = [], [], []
            for number in range(ROUNDS):
                gateway.cli("mount", "s", scratch / "m", check=True)
                ours.append(_timed(scratch / "m" / "files" / "a.raw" / "whole"))
                gateway.cli("umount", scratch / "m", check=True)
                (scratch / "k").mkdir(exist_ok=True)
                mount_image("ext4", image, scratch / "k")
                kernel.append(_timed(scratch / "k"))
                unmount(scratch / "k")
                if number < 1:  # it takes a minute
                    with guestmounted(image, scratch / "g"):
                        guestmount.append(_timed(scratch / "g"))
            gateway.cli("snapshot", "delete", "s", "--yes", check=True)
    mine, peer, appliance = (statistics.median(one) for one in (ours, kernel, guestmount))
    print(f"find and tar of 5,000 files on ext4, cold, seconds, medians of {ROUNDS} rounds")
    print(f"  kernel's loop mount {peer:6.2f}")
    print(f"     guestmount (TCG) {appliance:6.2f}")
    print(f"                 ours {mine:6.2f}  ours/kernel {mine / peer:.1f}  guestmount/ours {appliance / mine:.1f}")
    state.release()


if __name__ == "__main__":
    main()
