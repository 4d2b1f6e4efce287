"""From command to the first file read, on a 10 GiB ext4 image: `frostgate mount` beside guestmount, in one run."""

import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from tests.gateway_process import GatewayProcess
from tests.lab import state
from tests.lab.filesystems import mount_filesystem, mount_loop, unmount
from tests.lab.guestmount import environment, guestmounted

GIB = 1 << 30
ROUNDS = 5


def _image(image: Path) -> None:
    with image.open("wb") as file:
        file.truncate(10 * GIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    directory = image.with_name("fill")
    directory.mkdir()
    mount_loop(image, directory)
    (directory / "etc").mkdir()
    (directory / "etc" / "hostname").write_text("guest\n")
    unmount(directory)


def main() -> None:
    """Measure and print."""
    lab = state.prepare()
    scratch = Path(tempfile.mkdtemp(prefix="bench-first-"))
    ours, peer = [], []
    with mount_filesystem("xfs", lab / "bench-first", 12 * GIB) as filesystem:
        image = filesystem.directory / "a.raw"
        _image(image)
        environment()
        with GatewayProcess(scratch / "gateway", {"p": {"kind": "nfs", "root": str(filesystem.directory)}}) as gateway:
            gateway.cli("snapshot", "create", "s", "p/a.raw", check=True)
            for number in range(ROUNDS):
                began = time.monotonic()
                gateway.cli("mount", "s", scratch / "ours", check=True)
                assert (scratch / "ours/files/a.raw/whole/etc/hostname").read_text() == "guest\n"
                ours.append(time.monotonic() - began)
                gateway.cli("umount", scratch / "ours", check=True)
                if number < 2:  # of half a minute each
                    began = time.monotonic()
                    with guestmounted(image, scratch / "peer"):
                        assert (scratch / "peer/etc/hostname").read_text() == "guest\n"
                        peer.append(time.monotonic() - began)
            gateway.cli("snapshot", "delete", "s", "--yes", check=True)
    mine, theirs = statistics.median(ours), statistics.median(peer)
    print(f"from command to the first file read, 10 GiB ext4, seconds, medians of {len(ours)} and {len(peer)} rounds")
    print(f"  guestmount (TCG) {theirs:6.2f}")
    print(f"              ours {mine:6.2f}  guestmount/ours {theirs / mine:.0f}")
    state.release()


if __name__ == "__main__":
    main()
