"""The StorPool simulator as a program: killed, stopped, started wrongly."""

import fcntl
import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from storpool import spapi
from typer.testing import CliRunner

from frostgate_storpool_sim import command
from tests.lab import leftovers, state
from tests.lab.storpool import SIMULATOR, StorpoolSim

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def _lab() -> Iterator[None]:
    yield
    state.release()


def below(directory: Path) -> tuple[list[Path], list[Path]]:
    """Mounts and loop devices that belong to a simulator."""
    mounts = [point for point in leftovers.mounts() if directory in point.parents]
    loops = [loop for loop in leftovers.loop_devices() if str(directory) in _backing(loop)]
    return mounts, loops


def _backing(loop: Path) -> str:
    return Path(f"/sys/block/{loop.name}/loop/backing_file").read_text()


def test_what_was_acknowledged_survives_kill_9() -> None:
    with StorpoolSim("storpool-killed") as sim:
        device = sim.create("disk", 16 * MIB, tags={"kept": "yes"})
        device.write_bytes(b"before")
        sim.api().snapshotCreateGroup({"volumes": [{"volume": "disk", "name": "cut"}], "tags": {"group": "g1"}})
        acknowledged = []

        def write() -> None:
            with suppress(OSError), device.open("r+b", buffering=0) as file:  # until the device is gone
                for number in itertools.count():
                    os.pwrite(file.fileno(), number.to_bytes(8, "big") * 512, 4096 * (number % 4096))
                    acknowledged.append(number)

        writer = threading.Thread(target=write)
        writer.start()
        while len(acknowledged) < 500:
            sim.api().snapshotCreateGroup({"volumes": [{"volume": "disk"}]})
        sim.kill()
        writer.join()
        sim.start()
        api = sim.api()
        assert api.volumeList("disk")[0].tags == {"kept": "yes"}
        assert api.snapshotList("cut")[0].tags == {"group": "g1"}
        assert [(found.volume, found.rights) for found in api.attachmentsList()] == [("disk", "rw")]
        content = device.read_bytes()
        for number in acknowledged[-4096:]:
            offset = 4096 * (number % 4096)
            assert int.from_bytes(content[offset : offset + 8]) in (number, number + 4096)
        sim.detach("disk")
        api.volumeRevert("disk", {"toSnapshot": "cut"})
        sim.attach("disk")
        assert device.read_bytes() == b"before".ljust(16 * MIB, b"\0")
        assert sim.terminate() == 0
        assert below(sim.directory) == ([], [])
        assert not sim.conf.exists()


def test_loop_devices_are_made_and_taken_away() -> None:
    with StorpoolSim("storpool-loops", loop=True) as sim:
        device, formatted = sim.create("disk", 64 * MIB), sim.devices / "formatted"
        assert sim.pid in leftovers.processes()
        assert [len(found) for found in below(sim.directory)] == [1, 1]
        assert device.is_block_device()
        assert device.resolve() == (sim.devices_by_id / sim.api().volumeList("disk")[0].globalId).resolve()
        assert run("mkfs.ext4", "-q", device) == (0, "")
        sim.api().snapshotCreate("disk", {"name": "formatted"})
        assert run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=64", "conv=fsync") == (0, "")
        sim.api().volumesReassignWait({"reassign": [{"snapshot": "formatted", "ro": [1]}]})
        assert run("blockdev", "--getro", formatted) == (0, "1\n")
        assert run("e2fsck", "-fn", formatted)[0] == 0
        assert run("e2fsck", "-fn", device)[0] != 0
        sim.api().volumeUpdate("disk", {"size": 128 * MIB})
        assert run("blockdev", "--getsize64", device) == (0, "134217728\n")
        with device.open("rb"), pytest.raises(spapi.ApiError, match="is open at client 1"):
            sim.detach("disk")
        sim.detach("disk")
        assert not device.is_symlink()
        assert len(below(sim.directory)[1]) == 1
        sim.kill()
        sim.start()
        assert run("e2fsck", "-fn", formatted)[0] == 0
        assert sim.terminate() == 0
        assert below(sim.directory) == ([], [])


def run(*words: str | Path) -> tuple[int, str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout


def test_wrong_arguments_say_what_to_do(tmp_path: Path) -> None:
    def complaint(*words: str | Path) -> str:
        done = CliRunner().invoke(command.main, ["--directory", str(tmp_path), *map(str, words)])
        assert done.exit_code in (1, 2)
        return " ".join(done.output.replace("│", " ").split())

    assert "HOST:PORT, such as" in complaint("--listen", "81")
    assert "LOCATION.ID, such as" in complaint("--cluster-id", "x")
    assert "NAME=ID, such as" in complaint("--other-cluster", "x")
    assert "either --token or" in complaint("--token", "1", "--token-file", tmp_path / "t")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert "choose another address with --listen" in complaint("--listen", address)
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another simulator runs in" in complaint()


def test_it_says_what_to_export_and_a_pool_for_frostgate(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [SIMULATOR, "--directory", tmp_path / "sim", "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        text=True,
        env=state.owned_environment(state.prepare()),
    )
    assert process.stdout
    said = "".join(iter(process.stdout.readline, "# for frostgate.toml\n"))
    process.terminate()
    said += process.stdout.read()
    assert process.wait(timeout=60) == 0
    assert "export SP_API_HTTP_HOST=127.0.0.1\n" in said
    assert "export SP_AUTH_TOKEN=" in said
    assert "[pools.storpool]" in said
    assert (tmp_path / "sim" / "token").stat().st_mode & 0o777 == 0o600
    process.stdout.close()
    assert not os.path.ismount(tmp_path / "sim" / "images")
