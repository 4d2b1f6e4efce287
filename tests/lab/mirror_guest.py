"""A VM whose root is this machine's own: its files read-only over 9p, and memory over them for what the guest writes.

So a program runs there unchanged, this repository's .venv included, under a kernel that can what this machine's cannot:
Debian's, with the NFS server and client (tests/lab/mirror/). The guest runs one program and is gone; nothing that it
does outlives it. Under TCG, with one CPU: a second costs more than it gains.
"""

import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lab import state

_START_TIMEOUT_S = 60

# What costs emulated CPUs time and is of no use here is off. The clock is the TSC, which is read without leaving the
# guest; the others are devices.
_KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog init_on_alloc=0 lsm= audit=0 clocksource=tsc tsc=reliable"
)


class MirrorGuest:
    """One guest; it runs while its `with` block does. `disks_bytes`: sizes of its blank disks /dev/vda, /dev/vdb."""

    def __init__(self, name: str, *, disks_bytes: Sequence[int] = (), memory_mib: int = 2048) -> None:
        self.directory = state.DEFAULT_STATE_DIR / name
        self.console_log = self.directory / "console"
        self._disks_bytes = disks_bytes
        self._memory_mib = memory_mib
        self._process: subprocess.Popen[bytes] | None = None
        self._talk: socket.socket | None = None

    def run(self, command: Sequence[str | Path], silence_s: float) -> Iterator[str]:
        """Run the program; yields the lines of its standard output until it ends.

        Raises TimeoutError after `silence_s` seconds without a line.
        """
        assert self._talk
        self._talk.settimeout(silence_s)
        self._talk.sendall(shlex.join(map(str, command)).encode() + b"\n")
        with self._talk.makefile("r", encoding="utf-8") as lines:
            yield from lines

    def console(self) -> str:
        """What the kernel and the program's standard error said."""
        return self.console_log.read_text(errors="replace") if self.console_log.exists() else ""

    def __enter__(self) -> Self:
        state.prepare()
        self.directory.mkdir(exist_ok=True)
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            path = self.directory / "talk.sock"
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(_START_TIMEOUT_S)
            self._process = subprocess.Popen(
                # with us dies the guest, also when we are killed
                ["setpriv", "--pdeathsig", "KILL", *self._qemu(path)],
                stdin=subprocess.DEVNULL,
                env=state.owned_environment(state.DEFAULT_STATE_DIR),
            )
            self._talk, _ = listener.accept()

    def _qemu(self, talk: Path) -> list[str]:
        image = state.BUILD_DIR / "mirror"
        if not (image / "built-from").is_file():
            raise FileNotFoundError(f"{image} is missing: run tests/lab/mirror/build.sh")
        words = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "pc,hpet=off", "-nodefaults"]
        words += ["-m", str(self._memory_mib), "-display", "none", "-no-reboot"]
        words += ["-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initrd")]
        words += ["-append", _KERNEL_COMMAND_LINE]
        words += ["-chardev", f"file,id=console,path={self.console_log}", "-serial", "chardev:console"]
        words += ["-device", "virtio-serial-pci", "-chardev", f"socket,id=talk,path={talk}"]
        words += ["-device", "virtserialport,chardev=talk,name=frostgate.talk"]
        for tag, path in (("host", Path("/")), ("over", image / "overlay")):
            options = "security_model=none,readonly=on,multidevs=remap"
            words += ["-fsdev", f"local,id={tag},path={path},{options}"]
            words += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        for number, size in enumerate(self._disks_bytes):
            disk = self.directory / f"disk{number}"
            with disk.open("wb") as file:
                file.truncate(size)
            words += ["-drive", f"file={disk},format=raw,if=virtio,cache=unsafe,discard=unmap"]
        return words

    def _stop(self) -> None:
        if self._talk is not None:
            self._talk.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
        state.release()
