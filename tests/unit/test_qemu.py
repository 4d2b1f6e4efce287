"""QEMU's tools on descriptors: nothing else is opened, they can be stopped, die with us, and tell a full disk."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from providers.base import Cancelled, PoolFull, SnapshotDamaged
from providers.nfs import blocks, qemu

MIB = 1 << 20


def image(path: Path, *options: str, size: int = 64 * MIB) -> qemu.Image:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(size)], check=True)
    return qemu.Image(os.open(path, os.O_RDWR), "qcow2")


def servers_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if child.name().startswith("qemu")]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    (tmp_path / "tiny").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path / "tiny"], check=True)
    yield tmp_path / "tiny"
    subprocess.run(["umount", tmp_path / "tiny"], check=True)


def test_what_a_header_names_is_not_opened_but_what_is_given(tmp_path: Path) -> None:
    (tmp_path / "named").write_bytes(b"named in the header" + bytes(4077))
    (tmp_path / "given").write_bytes(b"given by us" + bytes(4085))
    top = image(tmp_path / "top", "-F", "raw", "-b", str(tmp_path / "named"), size=4096)
    given = qemu.Image(os.open(tmp_path / "given", os.O_RDONLY), "raw")
    with blocks.ImageReader([top, given]) as reader:
        assert reader.read(0, 11) == b"given by us"
    with blocks.ImageReader([top]) as reader:
        assert reader.read(0, 4096) == bytes(4096)


@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
def test_a_full_disk_is_told(tmp_path: Path, tiny: Path, target_format: str) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(os.urandom(16 * MIB))
    target = os.open(tiny / "target", os.O_RDWR | os.O_CREAT)
    if target_format == "raw":
        os.ftruncate(target, 16 * MIB)
    chain = [qemu.Image(os.open(source, os.O_RDONLY), "raw")]
    with pytest.raises(PoolFull, match="No space left"):
        qemu.convert(chain, qemu.Image(target, target_format), lambda _: None)
    os.close(target)


def test_work_that_is_cancelled_stops(tmp_path: Path) -> None:
    (tmp_path / "source.raw").write_bytes(os.urandom(64 * MIB))
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    chain = [qemu.Image(os.open(tmp_path / "source.raw", os.O_RDONLY), "raw")]

    def cancel(_: float) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        qemu.convert(chain, qemu.Image(target, "qcow2"), cancel)
    assert not servers_of(os.getpid())


def test_progress_ends_with_the_work(tmp_path: Path) -> None:
    (tmp_path / "source.raw").write_bytes(os.urandom(8 * MIB))
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    seen: list[float] = []
    chain = [qemu.Image(os.open(tmp_path / "source.raw", os.O_RDONLY), "raw")]
    qemu.convert(chain, qemu.Image(target, "qcow2"), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_a_tool_does_not_end_with_the_thread_that_wanted_it(tmp_path: Path) -> None:
    opened: list[blocks.ImageReader] = []
    thread = threading.Thread(target=lambda: opened.append(blocks.ImageReader([image(tmp_path / "i")])))
    thread.start()
    thread.join()
    assert opened[0].read(0, 512) == bytes(512)
    opened[0].close()


def test_a_tool_ends_with_the_process_that_wanted_it(tmp_path: Path) -> None:
    image(tmp_path / "i")
    program = (
        "import os, sys, time; from providers.nfs import blocks, qemu;"
        "reader = blocks.ImageReader([qemu.Image(os.open(sys.argv[1], os.O_RDONLY), 'qcow2')]);"
        "print('open', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "i"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"open\n"
        (server,) = servers_of(process.pid)
        assert server.name() == "qemu-nbd"
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_no_image_is_damage(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"QFI\xfb" + b"j" * 4096)
    junk = qemu.Image(os.open(tmp_path / "junk", os.O_RDONLY), "qcow2")
    with pytest.raises(SnapshotDamaged):
        list(qemu.mapped([junk]))
    with pytest.raises(SnapshotDamaged):
        blocks.ImageReader([junk])
