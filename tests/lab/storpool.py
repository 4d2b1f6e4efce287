"""A simulated StorPool cluster (tests/lab/storpool_sim) below the lab's state directory."""

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from storpool import spapi

from tests.lab import state

SIMULATOR = Path(sys.executable).with_name("frostgate-storpool-sim")
TOKEN = "1556129910218014736"
TEMPLATE = "default"
CLIENT = 1
"""This host's client id; 2 and 3 are others'."""


class StorpoolSim:
    """One simulator, named by its directory below the lab's state. Safe to use from a `finally`.

    `options` are the command's: cluster_id="sim.c", latency_ms=20, capacity_gib=1, loop=True ...
    """

    def __init__(self, name: str = "storpool", **options: Any) -> None:
        self.directory = state.DEFAULT_STATE_DIR / name
        self.conf = self.directory / "storpool.conf"
        self.devices = self.directory / "dev" / "storpool"
        self.devices_by_id = self.directory / "dev" / "storpool-byid"
        self.port = 0
        self._options = options
        self._log = state.DEFAULT_STATE_DIR / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def pool(self, **more: Any) -> dict[str, Any]:
        """The table of a pool of Frostgate's."""
        return {
            "kind": "storpool",
            "template": TEMPLATE,
            "conf": str(self.conf),
            "devices_by_id": str(self.devices_by_id),
            "device_directories": [str(self.devices)],
            **more,
        }

    def api(self, **options: Any) -> spapi.Api:
        """The real bindings, connected. By default what is transient is not retried."""
        return spapi.Api(host="127.0.0.1", port=self.port, auth=TOKEN, **{"transientRetries": 0, **options})

    def start(self, timeout_s: float = 60) -> None:
        """Start, with what the directory has; it answers when this returns. On a second time, at the same port."""
        state.prepare()
        self.conf.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [SIMULATOR, *self._words()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=state.owned_environment(state.DEFAULT_STATE_DIR),
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout_s
        while not self.conf.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the simulator does not start: {self.log()}")
            time.sleep(0.02)
        self.port = int(dict(line.split("=") for line in self.conf.read_text().split())["SP_API_HTTP_PORT"])

    def terminate(self) -> int:
        """SIGTERM, keeping the directory; returns the exit code."""
        if self._process is None:
            return 0
        self._process.terminate()
        code = self._process.wait(timeout=60)
        self._process = None
        return code

    def kill(self) -> None:
        """SIGKILL, keeping the directory: start() goes on with it."""
        assert self._process
        self._process.kill()
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        """Stop and forget everything. Repeatable."""
        self.terminate()
        shutil.rmtree(self.directory, ignore_errors=True)
        self._log.unlink(missing_ok=True)

    def log(self) -> str:
        """What the simulator complains of."""
        return self._log.read_text(errors="replace")

    # what tests do to it

    def inject(self, method: str, kind: str, **more: Any) -> None:
        """Let something go wrong with the next calls: frostgate_storpool_sim.faults.Fault."""
        self._admin("POST", "faults", {"method": method, "kind": kind, **more})

    def forget_faults(self) -> None:
        """Let nothing more go wrong."""
        self._admin("DELETE", "faults")

    def calls(self) -> dict[str, int]:
        """How often each call was made, by the query's name ("VolumesGroupSnapshot")."""
        counted: dict[str, int] = self._admin("GET", "calls")["calls"]
        return counted

    def forget_calls(self) -> None:
        """Count from zero."""
        self._admin("DELETE", "calls")

    def set_capacity(self, size_bytes: int) -> None:
        """Let the cluster have this much room until it is started again."""
        self._admin("POST", "capacity", {"bytes": size_bytes})

    def create(self, name: str, size_bytes: int, *, attach: bool = True, **more: Any) -> Path:
        """Make a volume, attached to this host; returns where its device is when it is."""
        self.api().volumeCreate({"name": name, "size": size_bytes, "template": TEMPLATE, **more})
        if attach:
            self.attach(name)
        return self.devices / name

    def attach(self, name: str, client: int = CLIENT, rights: str = "rw") -> None:
        """Attach a volume."""
        self.api().volumesReassignWait({"reassign": [{"volume": name, rights: [client]}]})

    def detach(self, name: str, *, force: bool = False) -> None:
        """Detach a volume from every client."""
        self.api().volumesReassignWait({"reassign": [{"volume": name, "detach": "all", "force": force}]})

    def _words(self) -> list[str]:
        words = [f"--directory={self.directory}", f"--listen=127.0.0.1:{self.port}", f"--token={TOKEN}", "--admin"]
        for name, value in self._options.items():
            flag = f"--{name.replace('_', '-')}"
            words.append(flag if value is True else f"{flag}={value}")
        return words

    def _admin(self, method: str, what: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/admin/{what}",
            method=method,
            headers={"Authorization": f"Storpool v1:{TOKEN}"},
            data=None if body is None else json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
