"""QEMU's tools on images that we have opened: what a header names is never opened, only what it is given.

An image is handed over as a descriptor, its whole chain of backing files with it, every format said: QEMU opens
/proc/self/fd/N and neither follows a name in a header nor probes a content. The one other file that a header can
name, a data file, has to be refused before (qcow2.py). The tools run without privileges that they do not need, with
limits on memory, and die with us.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from providers.base import CapabilityMissing, PoolFull, PoolUnavailable, ProviderError, SnapshotDamaged

_MEMORY_BYTES = 4 << 30
_POLL_S = 0.5
# setpriv, not preexec_fn: running Python between fork and exec is not safe beside gRPC's threads. dac_override:
# images belong to whom the hypervisor wants
_CAGE = (
    *("prlimit", f"--as={_MEMORY_BYTES}", "--core=0"),
    *("setpriv", "--pdeathsig", "KILL", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all,+dac_override"),
)
_FULL = ("No space left on device", "Disk quota exceeded")
_AWAY = ("Input/output error", "Stale file handle", "Connection timed out", "Cannot allocate memory", '" lock')
_PERCENT = re.compile(rb"\((\d+\.\d+)/100%\)")

# PR_SET_PDEATHSIG looks at the thread that started the process: this one stays as long as we do
_starter = ThreadPoolExecutor(1, thread_name_prefix="qemu-starter")


@dataclass(frozen=True, slots=True)
class Image:
    """One file of a chain: an open descriptor, which stays the caller's, and its format, "raw" or "qcow2"."""

    descriptor: int
    format: str


Chain = Sequence[Image]
"""An image and its backing files, from the top down."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """A range of guest bytes: where it lies. `depth` is the index in the chain.

    `offset` is where its bytes are in that file as they are, None when they are not (compressed, encrypted, zeros).
    """

    start: int
    length: int
    depth: int
    zero: bool
    offset: int | None


def source(chain: Chain) -> str:
    """Return a chain as QEMU's tools take it for a file name; pass descriptors_of(chain) along."""
    return "json:" + json.dumps(_node(chain))


def target(image: Image) -> str:
    """Return one image without its backing file as `--image-opts` has it."""
    return f"driver={image.format},file.driver=file,file.filename={path_of(image.descriptor)}"


def path_of(descriptor: int) -> str:
    """Return an open file's name for a tool that it is passed to. Not /dev/fd, which a bare system does not have."""
    return f"/proc/self/fd/{descriptor}"


def descriptors_of(chain: Chain) -> tuple[int, ...]:
    """Return what has to stay open in the tool."""
    return tuple(image.descriptor for image in chain)


def start(program: str, words: Sequence[str], descriptors: Sequence[int], **streams: Any) -> subprocess.Popen[bytes]:
    """Start one of QEMU's tools with descriptors of ours; the caller ends and reaps it.

    `streams` are Popen's stdout and stderr. Raises CapabilityMissing when a program is not installed.
    """
    command = [*_CAGE, program, *words]
    environment = {**os.environ, "LC_ALL": "C"}

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=descriptors, env=environment, bufsize=0, **streams
        )

    try:
        return _starter.submit(begin).result()
    except FileNotFoundError as error:
        raise CapabilityMissing(f"this needs {error.filename} (Debian: qemu-utils, util-linux)") from None


@contextmanager
def running(program: str, words: Sequence[str], descriptors: Sequence[int]) -> Iterator[IO[bytes]]:
    """Run a tool; yields its output. Ends it when the block raises, and raises what it failed of otherwise."""
    with tempfile.TemporaryFile() as said:
        process = start(program, words, descriptors, stdout=subprocess.PIPE, stderr=said)
        assert process.stdout  # noqa: S101 - for the type checker
        try:
            with process.stdout as output:
                yield output
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.returncode:
            said.seek(0)
            raise failure(program, said.read(65536).decode(errors="replace") or f"exit code {process.returncode}")


def run(program: str, words: Sequence[str], descriptors: Sequence[int], *, timeout_s: float) -> bytes:
    """Run a tool that is done soon; returns its output. Raises PoolUnavailable after `timeout_s`, and as failure()."""
    deadline = time.monotonic() + timeout_s
    content = b""
    with running(program, words, descriptors) as output:
        while True:
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise PoolUnavailable(f"{program} does not answer within {timeout_s:g} s")
            part = os.read(output.fileno(), 1 << 16)
            if not part:
                return content
            content += part


def convert(
    chain: Chain,
    into: Image,
    progress: Callable[[float], None],
    *,
    options: Sequence[str] = (),
) -> None:
    """Write a chain's guest bytes into an empty file, sparsely; the target stands alone. Nothing is synced.

    A raw target has to have its size already and to be all zeros. `progress` is called with the fraction that is
    done, every half second at least; when it raises, the work ends. `options` are more words for `qemu-img convert`.
    Raises PoolFull, CapabilityMissing, SnapshotDamaged, PoolUnavailable.
    """
    if into.format == "raw":
        where = ["-n", "--target-is-zero", "--target-image-opts", source(chain), target(into)]
    else:
        where = ["-O", into.format, source(chain), path_of(into.descriptor)]
    descriptors = (*descriptors_of(chain), into.descriptor)
    with running("qemu-img", ["convert", "-p", *options, *where], descriptors) as output:
        done, unread = 0.0, b""
        while True:
            if select.select([output], [], [], _POLL_S)[0]:
                part = os.read(output.fileno(), 4096)
                if not part:
                    return
                unread = (unread + part)[-256:]
                if found := _PERCENT.findall(unread):
                    done = float(found[-1]) / 100
            progress(done)


def mapped(chain: Chain) -> Iterator[Mapped]:
    """Yield where every guest byte lies, ascending and without gaps: what `qemu-img map` says.

    Raises CapabilityMissing, SnapshotDamaged, PoolUnavailable.
    """
    words = ["map", "--output=json", source(chain)]
    with running("qemu-img", words, descriptors_of(chain)) as output:
        for line in output:  # one entry a line: such a list can have millions
            text = line.strip().lstrip(b"[").rstrip(b",]")
            if text:
                entry = json.loads(text)
                offset = entry.get("offset") if entry["data"] and not entry["zero"] else None
                yield Mapped(entry["start"], entry["length"], entry["depth"], entry["zero"], offset)


def failure(program: str, said: str) -> ProviderError:
    """Return the error that a tool's words mean."""
    words = " ".join(said.split())[:500]
    if any(sign in words for sign in _FULL):
        return PoolFull(f"{program}: {words}; make room")
    if "key-secret" in words:
        return CapabilityMissing("the image is encrypted by QEMU, and the key is not ours: its bytes cannot be read")
    if any(sign in words for sign in _AWAY):
        return PoolUnavailable(f"{program}: {words}")
    return SnapshotDamaged(f"{program}: {words}")


def _node(chain: Chain) -> dict[str, Any]:
    image, below = chain[0], chain[1:]
    node: dict[str, Any] = {
        "driver": image.format,
        "file": {"driver": "file", "filename": path_of(image.descriptor)},
    }
    if image.format == "qcow2":
        node["backing"] = _node(below) if below else None
    elif below:
        raise ValueError("a raw image has no backing file")
    return node
