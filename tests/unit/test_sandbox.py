"""The cage of a parser, tried from within by a process that has been taken over."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clients.files import sandbox

_CONFINED = """
import ctypes, errno, os, signal, socket
from clients.files import sandbox
sandbox.confine()
"""


def confined(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a confined process."""
    command = [sys.executable, "-c", _CONFINED + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd')",
        "open('/tmp/x', 'w')",
        "os.listdir('/')",
        "os.unlink('/tmp/x')",
        "os.readlink('/proc/self/exe')",
        "os.setuid(0)",
        "os.chmod('/tmp', 0o777)",
    ],
)
def test_files_and_rights_are_out_of_reach(code: str) -> None:
    told = confined(f"try:\n    {code}\nexcept PermissionError:\n    print('refused')")
    assert told.stdout == "refused\n", told.stderr


@pytest.mark.parametrize(
    "code",
    [
        "socket.socket()",
        "socket.socketpair()",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "ctypes.CDLL(None).ptrace(0, 0, 0, 0)",
    ],
)
def test_what_no_parser_does_ends_it(code: str) -> None:
    told = confined(f"{code}\nprint('still here')")
    assert told.stdout == ""
    assert told.returncode == -signal.SIGSYS


def test_memory_is_bounded() -> None:
    told = confined("try:\n    bytearray(2 << 30)\nexcept MemoryError:\n    print('refused')")
    assert told.stdout == "refused\n", told.stderr
    assert sandbox.MEMORY_BYTES <= 1 << 30


def test_what_it_has_open_can_be_read_but_not_grown(tmp_path: Path) -> None:
    kept = tmp_path / "file"
    kept.write_bytes(b"content")
    code = f"""
import os, signal
file = os.open({str(kept)!r}, os.O_RDWR)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
{_CONFINED}
try:
    os.write(file, b"longer than before")
except OSError as error:
    print(os.pread(file, 7, 0), error.errno == errno.EFBIG)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert told.stdout == "b'content' True\n", told.stderr
    assert kept.read_bytes() == b"content"


def test_an_answer_that_takes_too_long_ends_the_parser() -> None:
    code = """
import signal, socket, sys
from clients.files import wire, worker
ours, theirs = socket.socketpair()
class Endless:
    def __getattr__(self, name):
        def loop(*arguments):
            while True:
                pass
        return loop
worker.ANSWER_S = 0.2
wire.send(ours, ["layout"])
worker.serve(theirs, Endless())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert told.returncode == -signal.SIGALRM, told.stderr
