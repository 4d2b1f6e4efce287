"""Mounting the recorded file system and telling it what to do. See the package's text."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab import state
from tests.lab.filesystems import unmount
from tests.lab.powercut.disk import Disk, Operation

_CONTROL = "user.powercut:"


class PowercutMount:
    """An empty file system on a directory, for the time of a `with` block."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.powercut", self.directory],
            cwd=state.REPOSITORY,
            env=state.owned_environment(state.DEFAULT_STATE_DIR),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError("the recorded file system cannot be mounted: is /dev/fuse there?")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unmount(self.directory)
        self._process.terminate()  # a test that failed may have left files open
        self._process.wait(timeout=60)
        assert self._process.stdout
        self._process.stdout.close()
        self.directory.rmdir()

    def begin(self) -> None:
        """Take what is there as durable, and record from here on."""
        self._tell(do="begin")

    def mark(self, text: str) -> None:
        """Put a word into the record."""
        self._tell(do="mark", text=text)

    def record(self) -> tuple[Disk, list[Operation], Disk]:
        """Return the disk at begin(), what was done since, and the disk now."""
        with tempfile.NamedTemporaryFile() as file:
            self._tell(do="dump", path=file.name)
            found: tuple[Disk, list[Operation], Disk] = pickle.loads(Path(file.name).read_bytes())
            return found

    def save(self, name: str) -> None:
        """Keep what is there for restore()."""
        self._tell(do="save", name=name)

    def restore(self, name: str) -> None:
        """Bring back what save() kept, and begin(); no file may be open."""
        self._tell(do="restore", name=name)

    def fail(self, at: int, number: int, *, lasting: bool = False, changing: bool = False) -> None:
        """Let the at-th call from now on fail with an errno, 1 for the next one.

        `lasting`: and all after it. `changing`: only those that change something.
        """
        self._tell(do="fault", fault={"at": at, "errno": number, "lasting": lasting, "changing": changing})

    def hang(self, at: int) -> None:
        """Let the at-th call from now on hang, without being done, until heal()."""
        self._tell(do="fault", fault={"at": at, "hang": True})

    def watch(self) -> None:
        """Note the calls until heal()."""
        self._tell(do="fault", fault={"at": 0})

    def heal(self) -> list[str]:
        """End fail() and hang(); returns the calls since, by name."""
        calls: list[str] = self._asked()["calls"]
        self._tell(do="fault", fault=None)
        return calls

    def is_hanging(self) -> bool:
        """Whether a call hangs."""
        hanging: bool = self._asked()["hanging"]
        return hanging

    def _tell(self, **order: Any) -> None:
        os.getxattr(self.directory, _CONTROL + json.dumps(order))

    def _asked(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(os.getxattr(self.directory, _CONTROL))
        return found
