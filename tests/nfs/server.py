"""The kernel's NFS server in this (guest) machine, and its exports mounted back over NFS 4.2.

The directories below /srv are the outside oracle: what is there is on the server, whatever a client believes; and
programs that use them are to the client as programs on another host.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SERVED = Path("/srv")
_EXPORTED = Path("/run/exports")
"""The server's root, with the exports bound below it: the guest's own root is an overlay, which cannot be exported."""

MOUNTED = Path("/mnt/nfs")
_CONTROL, _PIPES = Path("/proc/fs/nfsd"), Path("/var/lib/nfs/rpc_pipefs")
GRACE_S = 10
"""What a restarted server waits for clients to claim their locks again, at most; the least that the kernel allows."""

MOUNT_OPTIONS = "vers=4.2,hard,proto=tcp"

_MKFS = {"xfs": ["-f", "-m", "reflink=1"], "ext4": ["-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]}
_NOT_3 = ["--no-nfs-version", "3"]  # which would need rpcbind


@dataclass(frozen=True)
class Export:
    """A directory of one of the two file systems; `options` as in exports(5), `owner` the user and group number."""

    name: str
    filesystem: str
    options: str = "rw,no_root_squash"
    owner: int = 0

    @property
    def served(self) -> Path:
        return SERVED / self.filesystem / self.name

    @property
    def exported(self) -> Path:
        return _EXPORTED / self.name

    @property
    def mounted(self) -> Path:
        return MOUNTED / self.name


class Server:
    """nfsd with its exports. Started once; then stopped and started by tests as an operator or a crash would."""

    def __init__(self, exports: tuple[Export, ...], devices: dict[str, Path]) -> None:
        self.exports = exports
        self._devices = devices
        self._daemons: list[subprocess.Popen[bytes]] = []

    def set_up(self) -> None:
        """File systems, daemons, exports, mounts. They end with the guest."""
        for filesystem, device in self._devices.items():
            _run(f"mkfs.{filesystem}", "-q", *_MKFS[filesystem], device)
            (SERVED / filesystem).mkdir(parents=True, exist_ok=True)
            _run("mount", device, SERVED / filesystem)
        _EXPORTED.mkdir(exist_ok=True)
        _run("mount", "-t", "tmpfs", "exports", _EXPORTED)
        for export in self.exports:
            export.served.mkdir()
            os.chown(export.served, export.owner, export.owner)
            export.exported.mkdir()
            self.bind(export)
        _run("mount", "-t", "nfsd", "nfsd", _CONTROL)
        _run("mount", "-t", "rpc_pipefs", "rpc_pipefs", _PIPES)
        for command in (["nfsdcld", "--foreground"], ["rpc.mountd", "--foreground", "--no-nfs-version", "2", *_NOT_3]):
            self._daemons.append(subprocess.Popen(command))
        self.start()
        for export in self.exports:
            export.mounted.mkdir(parents=True, exist_ok=True)
            self.mount(export)

    def start(self) -> None:
        """Export everything and serve. Repeatable."""
        root = Export("", "", "ro")
        for number, export in enumerate((root, *self.exports)):
            options = f"{export.options},sync,no_subtree_check,fsid={number}"
            _run("exportfs", "-i", "-o", options, f"127.0.0.1:{export.exported}")
        grace = ["--lease-time", str(GRACE_S), "--grace-time", str(GRACE_S)]
        _run("rpc.nfsd", *_NOT_3, *grace, "4")

    def stop(self) -> None:
        """Serve nothing: clients wait, as the mount is hard. At once, without a program to start first."""
        (_CONTROL / "threads").write_text("0\n")

    def restart(self) -> None:
        """stop() and start(); locks are claimed again."""
        self.stop()
        self.start()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nothing is served meanwhile."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def replace(self, export: Export) -> None:
        """Put another directory with copies of the files, but not the directories, where an export's was."""
        self.stop()
        _run("exportfs", "-u", "-a")
        _run("exportfs", "-f")  # which lets the kernel forget the old directory
        _run("umount", export.exported)
        # both are there for a while, so that the new one cannot have the old one's inode number
        old = export.served.rename(export.served.with_name(f"{export.name}.old"))
        export.served.mkdir()
        for path in old.iterdir():
            if path.is_file():
                shutil.copy(path, export.served)
        shutil.rmtree(old)
        self.bind(export)
        self.start()

    def bind(self, export: Export) -> None:
        """Put an export's directory where it is exported from."""
        _run("mount", "--bind", export.served, export.exported)

    def mount(self, export: Export, options: str = MOUNT_OPTIONS) -> None:
        """Mount an export where its pool is."""
        _run("mount", "-t", "nfs", "-o", options, f"127.0.0.1:/{export.name}", export.mounted)

    def remount(self, export: Export) -> None:
        """Mount an export anew, whoever still has a file of it open."""
        _run("umount", "-l", export.mounted)
        self.mount(export)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)
