"""Where the lab keeps everything: one directory, found again by a later process.

The directory is bind-mounted on itself with shared propagation, so that file systems mounted
below it later are also seen by the private libvirtd and its guests (another mount namespace).
Mounts made elsewhere after the hypervisor started are not: keep pools below the state directory.
Paths are short because unix socket paths end at 107 characters.
"""

import os
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LAB_STATE_DIR = Path(os.environ.get("FROSTGATE_LAB_STATE", "/run/frostgate-lab"))
_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
DEFAULT_STATE_DIR = LAB_STATE_DIR.with_name(f"{LAB_STATE_DIR.name}-{_WORKER}") if _WORKER else LAB_STATE_DIR
"""Each of pytest's workers has a lab of its own."""
OWNER_VARIABLE = "FROSTGATE_LAB_OWNER"
BUILD_DIR = Path(os.environ.get("FROSTGATE_LAB_BUILD", REPOSITORY / ".lab"))
"""What outlives a run: the guest image, downloaded packages, libvirt's knowledge of this QEMU."""


def guest_image() -> tuple[Path, Path]:
    """Kernel and initramfs of the lab guest; FileNotFoundError says how to build them."""
    kernel, initrd = BUILD_DIR / "guest" / "vmlinuz", BUILD_DIR / "guest" / "initrd"
    for file in (kernel, initrd):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: run tests/lab/install.sh")
    return kernel, initrd


def prepare(state_dir: Path = DEFAULT_STATE_DIR) -> Path:
    """Make the state directory, shared with later mount namespaces. Repeatable."""
    state_dir.mkdir(parents=True, exist_ok=True)
    state_dir = state_dir.resolve()
    if not _is_shared(state_dir):
        subprocess.run(["mount", "--bind", state_dir, state_dir], check=True)
        subprocess.run(["mount", "--make-shared", state_dir], check=True)
    return state_dir


def all_state_dirs(state_dir: Path = LAB_STATE_DIR) -> list[Path]:
    """A lab's state directory and those of pytest's workers beside it, as far as they are there."""
    return [found for found in [state_dir, *sorted(state_dir.parent.glob(f"{state_dir.name}-gw*"))] if found.exists()]


def release(state_dir: Path = DEFAULT_STATE_DIR) -> None:
    """Undo prepare() when nobody keeps anything in the state directory any more. Repeatable."""
    while state_dir.is_dir() and not any(state_dir.iterdir()) and _is_shared(state_dir.resolve()):
        subprocess.run(["umount", state_dir], check=True)
    if state_dir.is_dir() and not any(state_dir.iterdir()):
        state_dir.rmdir()


def owned_environment(state_dir: Path) -> dict[str, str]:
    """Environment for a process that `python -m tests.lab down` must find again, whatever becomes of us."""
    return {**os.environ, OWNER_VARIABLE: str(state_dir.resolve())}


def _is_shared(mount_point: Path) -> bool:
    # not os.path.ismount, which does not see a bind mount within one file system
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(f" {mount_point} " in line and " shared:" in line.split(" - ")[0] for line in lines)
