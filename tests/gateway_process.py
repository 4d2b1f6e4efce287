"""A real `frostgate serve`: started, asked for its health, stopped, killed, and its log read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from frostgate.v1.snapshot_provider_pb2_grpc import SnapshotProviderStub
from tests.lab import state

FROSTGATE = Path(sys.executable).with_name("frostgate")


class GatewayProcess:
    """One gateway with its files in a directory; started by entering its `with` block."""

    def __init__(self, directory: Path, pools: dict[str, dict[str, Any]], **limits: float) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.address = f"unix:{directory}/frostgate.sock"
        self.config = directory / "frostgate.toml"
        self._log = directory / "gateway.log"
        self._process: subprocess.Popen[bytes] | None = None
        lines = ["[gateway]", f"listen = [{json.dumps(self.address)}]", f'journal = "{directory}/journal.db"']
        lines += ["[gateway.limits]", *(f"{name} = {value}" for name, value in limits.items())]
        for name, table in pools.items():
            lines += [f"[pools.{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
        self.config.write_text("\n".join(lines) + "\n")

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """For client programs."""
        return {**state.owned_environment(state.DEFAULT_STATE_DIR), "FROSTGATE_ADDRESS": self.address}

    def start(self, timeout_s: float = 20) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [FROSTGATE, "serve", "--config", self.config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        deadline = time.monotonic() + timeout_s
        while not (self.directory / "frostgate.sock").exists():  # cheaper than to ask a gateway that is not there yet
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the gateway does not start: {self._log.read_text()}")
            time.sleep(0.02)
        self.channel = grpc.insecure_channel(self.address)
        self.stub = SnapshotProviderStub(self.channel)
        while True:
            try:
                answer = health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the gateway does not start: {self._log.read_text()}") from None
            time.sleep(0.03)
            self.channel.close()
            self.channel = grpc.insecure_channel(self.address)
            self.stub = SnapshotProviderStub(self.channel)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def log(self) -> list[dict[str, Any]]:
        """The log's lines; what is no JSON (a traceback) comes as {"level": "garbage", "event": line}."""
        lines = []
        for line in self._log.read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                lines.append({"level": "garbage", "event": line})
        return lines

    def cli(self, *words: str | Path, check: bool = False, **keywords: Any) -> subprocess.CompletedProcess[str]:
        """Run the frostgate command against this gateway."""
        command = [FROSTGATE, *map(str, words)]
        environment = {**self.environment, **keywords.pop("env", {})}
        return subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=check,
            timeout=300,
            stdin=subprocess.DEVNULL,
            **keywords,
        )

    def rebuild_journal(self) -> dict[str, list[str]]:
        """Lose the journal of a gateway that does not run; what `frostgate reconcile` says, which rebuilds it."""
        for path in self.directory.glob("journal.db*"):
            path.unlink()
        said: dict[str, list[str]] = json.loads(self.cli("reconcile", "--config", self.config, check=True).stdout)
        return said

    def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        self.channel.close()
        if self._process.poll() is None:
            os.kill(self._process.pid, number)
        code = self._process.wait(timeout=60)
        self._process = None
        return code

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)


def reason_of(error: grpc.RpcError) -> str:
    """The contract's reason of an error."""
    return error_info(error).reason


def error_info(error: grpc.RpcError) -> error_details_pb2.ErrorInfo:
    """The ErrorInfo of an error."""
    return _detail(error, error_details_pb2.ErrorInfo())


def violations_of(error: grpc.RpcError) -> list[str]:
    """The fields that an error complains of."""
    return [violation.field for violation in _detail(error, error_details_pb2.BadRequest()).field_violations]


def _detail(error: grpc.RpcError, into: Any) -> Any:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status else ():
        if detail.Unpack(into):
            return into
    raise AssertionError(f"no {type(into).__name__} in {error}")
