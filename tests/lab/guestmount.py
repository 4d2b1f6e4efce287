"""guestmount, the peer: libguestfs with Debian's cloud kernel under TCG.

It and its appliance are heavy (about 400 MB of packages), so that only the benches that compare with it install it.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.lab import state

_PACKAGES = ("libguestfs-tools", "kmod")


def environment() -> dict[str, str]:
    """Install it where it is missing, give it a kernel; returns the environment that it runs with."""
    if subprocess.run(["which", "guestmount"], capture_output=True, check=False).returncode:
        print(f"bench: installing {', '.join(_PACKAGES)} (guestmount, the peer)", file=sys.stderr)
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *_PACKAGES]
        subprocess.run(install, check=True, env=quiet, stdout=subprocess.DEVNULL)
    Path("/lib/modules").mkdir(exist_ok=True)  # supermin copies from there too, and ends without it
    kernel = _kernel()
    (modules,) = (kernel / "lib" / "modules").iterdir()
    (image,) = (kernel / "boot").glob("vmlinuz-*")
    return {
        **os.environ,
        "LIBGUESTFS_BACKEND": "direct",
        "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
        "SUPERMIN_KERNEL": str(image),
        "SUPERMIN_MODULES": str(modules),
    }


@contextmanager
def guestmounted(image: Path, directory: Path, device: str = "/dev/sda") -> Iterator[None]:
    """Mount a raw image that is one file system."""
    directory.mkdir(exist_ok=True)
    told = directory.with_name(directory.name + ".pid")
    command = ["guestmount", "--ro", "--format=raw", "--pid-file", told, "-a", image, "-m", device, directory]
    subprocess.run(command, check=True, env=environment())
    serving = psutil.Process(int(told.read_text()))
    try:
        yield
    finally:
        subprocess.run(["guestunmount", directory], check=True)
        serving.wait(120)  # it has the image open for a while yet


def _kernel() -> Path:
    """Unpack the kernel of the lab's guest with all of its modules. Repeatable."""
    place = state.BUILD_DIR / "guestmount-kernel"
    if not place.is_dir():
        with tempfile.TemporaryDirectory(dir=state.BUILD_DIR) as scratch:
            unpacked = Path(scratch) / "kernel"
            package = max((state.BUILD_DIR / "cache" / "packages").glob("linux-image-*-cloud-amd64_*.deb"))
            subprocess.run(["dpkg-deb", "--extract", package, unpacked], check=True)
            (release,) = (unpacked / "lib" / "modules").iterdir()
            subprocess.run(["depmod", "-b", unpacked, release.name], check=True)
            unpacked.rename(place)
    return place
