"""The command line as people and scripts use it: help, wrong words, no gateway, pipes, and exit codes that mean it."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway_process import FROSTGATE, GatewayProcess
from tests.holding_proxy import HoldingProxy
from tests.lab.disk import allocated_ranges, sha256

MIB = 1 << 20
COMMANDS = [
    *(["serve"], ["reconcile"], ["pools"], ["volumes"], ["doctor"], ["snapshot"], ["vm"]),
    *(["snapshot", word] for word in ("create", "prepare", "confirm", "show", "list", "watch", "revert", "delete")),
    *(["snapshot", "read"], ["snapshot", "extents"]),
    *(["vm", word] for word in ("snapshot", "list", "revert", "delete", "prune", "thaw")),
]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    pool = tmp_path_factory.mktemp("pool")
    with (pool / "a.raw").open("wb") as file:
        file.write(b"begin")
        file.truncate(64 * MIB)
        file.seek(40 * MIB)
        file.write(os.urandom(MIB))
    (pool / "[red]b.raw").write_bytes(b"b" * MIB)
    with GatewayProcess(tmp_path_factory.mktemp("gateway"), {"fast": {"kind": "nfs", "root": str(pool)}}) as running:
        yield running


@pytest.fixture
def taken(gateway: GatewayProcess) -> Iterator[str]:
    gateway.cli("snapshot", "create", "taken", "fast/a.raw", "-l", "why=test", check=True)
    yield "taken"
    gateway.cli("snapshot", "delete", "taken", "--yes", check=True)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(gateway: GatewayProcess, command: list[str]) -> None:
    told = gateway.cli(*command, "--help")
    assert told.returncode == 0
    assert "Usage: frostgate" in told.stdout
    assert "--help" in told.stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nonsense"], 2, "No such command"),
        (["volumes"], 2, "Missing argument"),
        (["volumes", "nope"], 3, "no pool 'nope'"),
        (["volumes", "fast/nope"], 3, "nope"),
        (["snapshot", "create", "x", "no-slash"], 2, "POOL/VOLUME"),
        (["snapshot", "create", "..", "fast/a.raw"], 2, "id"),
        (["snapshot", "create", "x", "fast/missing"], 3, "missing"),
        (["snapshot", "create", "x", "fast/a.raw", "-l", "novalue"], 2, "KEY=VALUE"),
        (["snapshot", "create", "x"], 2, "spec"),
        (["snapshot", "show", "missing"], 3, "missing"),
        (["snapshot", "list", "--state", "odd"], 2, "READY"),
        (["snapshot", "revert", "missing"], 2, "--yes"),
        (["snapshot", "revert", "missing", "--yes"], 3, "missing"),
        (["snapshot", "delete", "missing"], 2, "--yes"),
        (["snapshot", "delete", "missing", "--yes"], 0, ""),
        (["snapshot", "read", "missing", "fast/a.raw", "-o", "x"], 3, "missing"),
        (["--address", "nonsense", "pools"], 2, "--address"),
        (["pools", "--output", "xml"], 2, "xml"),
        (["vm", "snapshot", "x", "--connect", "qemu+unix:///system?socket=/nowhere"], 5, "libvirt does not answer"),
        (["vm", "prune", "x"], 2, "--keep-last"),
    ],
)
def test_exit_codes_and_words(gateway: GatewayProcess, words: list[str], code: int, says: str) -> None:
    told = gateway.cli(*words)
    assert told.returncode == code, told
    assert says in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize("words", [["pools"], ["snapshot", "list"], ["doctor"], ["snapshot", "watch", "x"]])
def test_without_a_gateway_it_says_what_to_do(gateway: GatewayProcess, tmp_path: Path, words: list[str]) -> None:
    told = gateway.cli(*words, "--address", f"unix:{tmp_path}/none.sock")
    assert told.returncode == (1 if words == ["doctor"] else 5)
    assert "frostgate serve" in told.stderr + told.stdout


def test_json_is_one_document_with_the_contract_s_names(gateway: GatewayProcess, taken: str) -> None:
    shown = json.loads(gateway.cli("snapshot", "show", taken, "--output", "json", check=True).stdout)
    assert shown["id"] == taken
    assert shown["members"][0]["volume"] == {"pool": "fast", "volume": "a.raw"}
    assert json.loads(gateway.cli("--output", "json", "pools", check=True).stdout)[0]["name"] == "fast"
    refused = gateway.cli("snapshot", "show", "missing", "--output", "json")
    assert json.loads(refused.stderr)["reason"] == "GROUP_SNAPSHOT_NOT_FOUND"


def test_piped_tables_are_plain_and_whole(gateway: GatewayProcess) -> None:
    told = gateway.cli("volumes", "fast", check=True).stdout
    assert "\x1b" not in told
    assert "fast/[red]b.raw" in told
    assert all(line == line.rstrip() for line in told.splitlines())


def test_reading_is_sparse_complete_or_nothing(gateway: GatewayProcess, taken: str, tmp_path: Path) -> None:
    source = Path(json.loads(gateway.cli("volumes", "fast/a.raw", "-O", "json").stdout)["ref"]["volume"])
    target = tmp_path / "out.raw"
    gateway.cli("snapshot", "read", taken, f"fast/{source}", "-o", target, check=True)
    member = json.loads(gateway.cli("snapshot", "show", taken, "-O", "json").stdout)["members"][0]["local_path"]
    assert sha256(target) == sha256(Path(member))
    assert sum(length for _, length in allocated_ranges(target)) < 4 * MIB
    again = gateway.cli("snapshot", "read", taken, "fast/a.raw", "-o", target)
    assert again.returncode == 4
    piped = subprocess.run(
        [FROSTGATE, "snapshot", "read", taken, "fast/a.raw", "-o", "-"],
        env=gateway.environment,
        capture_output=True,
        check=True,
    )
    assert hashlib.sha256(piped.stdout).hexdigest() == sha256(target)
    nowhere = gateway.cli("snapshot", "read", taken, "fast/a.raw", "-o", tmp_path / "no" / "where")
    assert nowhere.returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.raw"]


def test_a_closed_pipe_is_no_error(gateway: GatewayProcess, taken: str) -> None:
    command = f"{FROSTGATE} snapshot read {taken} fast/a.raw -o - | head -c 5"
    told = subprocess.run(["bash", "-c", command], env=gateway.environment, capture_output=True, check=True)
    assert told.stdout == b"begin"
    assert told.stderr == b""


def test_ctrl_c_while_waiting_says_what_goes_on(gateway: GatewayProcess, taken: str, tmp_path: Path) -> None:
    with HoldingProxy(gateway.address, tmp_path / "p.sock", "GetGroupSnapshot") as proxy:
        # a test run in the background of a shell has SIGINT ignored, and would hand that on
        command = ["env", "--default-signal=INT", FROSTGATE, "--address", proxy.address, "snapshot", "show", taken]
        with subprocess.Popen(command, env=gateway.environment, stderr=subprocess.PIPE, text=True) as shown:
            assert proxy.held.wait(20)
            shown.send_signal(signal.SIGINT)
            _, said = shown.communicate(timeout=20)
    assert shown.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said


def test_serve_checks_its_configuration(gateway: GatewayProcess, tmp_path: Path) -> None:
    assert gateway.cli("serve", "--check", "--config", gateway.config).returncode == 0
    (tmp_path / "bad.toml").write_text('[pools.fast]\nkind = "nfs"\n')
    told = gateway.cli("serve", "--config", tmp_path / "bad.toml")
    assert told.returncode == 1
    assert "pools.fast.root" in told.stderr
    assert "Traceback" not in told.stderr


def test_sigterm_and_sigint_end_the_gateway_well(gateway: GatewayProcess, tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with GatewayProcess(tmp_path / number.name, {"p": {"kind": "nfs", "root": str(tmp_path)}}) as other:
            began = time.monotonic()
            os.kill(other.pid, number)
            assert other.stop() == 0
            assert time.monotonic() - began < 20
            assert other.log()[-1]["event"] == "stopped"
