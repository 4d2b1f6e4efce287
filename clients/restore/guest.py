"""Putting one file back into a running guest, through its agent.

The guest's own mktemp makes a file beside its place, under a name that nobody could foresee and for root alone; it is
written, given its owner and mode, and moved to its place by the guest's own `mv`. An agent that runs no programs is
refused: what it makes itself anybody in the guest may write to, and it follows links. In a directory that belongs to a
user of the guest that user can still put something else in the file's place, as with any program of root's there.
Source: qemu-ga's guest-file-open, guest-file-write, guest-file-flush, guest-file-close, guest-exec.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import structlog

_CHUNK_BYTES = 48 * 1024
_ANSWER_S = 30
_PROGRAM_S = 60.0
_NAME_BYTES = 200

_log = structlog.get_logger()


class GuestRefused(Exception):
    """The guest or its agent did not do it; the text says what is left there."""


class NoSuchVm(GuestRefused):
    """libvirt knows no VM of that name or UUID."""


def put(
    vm: str,
    uri: str | None,
    path: str,
    parts: Iterable[bytes],
    owner: tuple[int, int],
    mode: int,
    advance: Callable[[int], None],
) -> None:
    """Write a file in a guest; what has its name is replaced, unless it is a directory.

    Repeatable. Raises GuestRefused, NoSuchVm, and what `parts` raises; the guest has what it had before then.
    """
    import libvirt
    import libvirt_qemu

    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it would print what we raise
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise GuestRefused(f"libvirt: {error}") from None
    try:
        try:
            domain = _domain(connection, vm)
        except libvirt.libvirtError as error:
            raise NoSuchVm(f"VM {vm}: {error}") from None

        def agent(name: str, **arguments: Any) -> Any:
            request = json.dumps({"execute": name, "arguments": arguments})
            try:
                return json.loads(libvirt_qemu.qemuAgentCommand(domain, request, _ANSWER_S, 0)).get("return")
            except libvirt.libvirtError as error:
                raise GuestRefused(f"{name} in VM {vm}: {error}") from None

        beside = _beside(agent, path)
        try:
            _write(agent, beside, parts, advance)
            _run(agent, "chown", ["-h", f"{owner[0]}:{owner[1]}", beside])
            _run(agent, "chmod", [f"{mode:o}", beside])
            _run(agent, "mv", ["-f", "-T", beside, path])
        except BaseException:
            _remove(agent, beside)
            raise
    finally:
        connection.close()


def _domain(connection: Any, vm: str) -> Any:
    import libvirt

    try:
        return connection.lookupByName(vm)
    except libvirt.libvirtError:
        return connection.lookupByUUIDString(vm)


def _beside(agent: Callable[..., Any], path: str) -> str:
    """Make an empty file in a path's directory that only root may open; return its path."""
    directory, _, name = path.rpartition("/")
    template = f".{name.encode()[:_NAME_BYTES].decode(errors='ignore')}.frostgate-XXXXXX"
    try:
        made = _run(agent, "mktemp", ["-p", directory or "/", template]).removesuffix("\n")
    except GuestRefused as error:
        raise GuestRefused(f"nothing can be made in {directory or '/'}: {error}") from None
    if not made.startswith("/"):
        raise GuestRefused(f"mktemp in the guest says {made!r}")
    return made


def _remove(agent: Callable[..., Any], beside: str) -> None:
    """Remove what we made, after a failure; that it cannot be removed is said."""
    try:
        _run(agent, "rm", ["-f", beside])
    except GuestRefused as error:
        _log.warning("left_in_guest", path=beside, error=str(error))


def _write(agent: Callable[..., Any], path: str, parts: Iterable[bytes], advance: Callable[[int], None]) -> None:
    handle = agent("guest-file-open", path=path, mode="r+")  # which makes no file
    try:
        for part in parts:
            for at in range(0, len(part), _CHUNK_BYTES):
                chunk = part[at : at + _CHUNK_BYTES]
                while chunk:
                    encoded = base64.b64encode(chunk).decode()
                    written = agent("guest-file-write", handle=handle, **{"buf-b64": encoded})["count"]
                    if not written:
                        raise GuestRefused("the guest's disk is full?")
                    advance(written)
                    chunk = chunk[written:]
        agent("guest-file-flush", handle=handle)
    finally:
        agent("guest-file-close", handle=handle)


def _run(agent: Callable[..., Any], program: str, words: list[str]) -> str:
    """Run a program in the guest; return what it prints. Raises GuestRefused with what it says."""
    pid = agent("guest-exec", path=program, arg=words, **{"capture-output": True})["pid"]
    deadline = time.monotonic() + _PROGRAM_S
    while time.monotonic() < deadline:
        status = agent("guest-exec-status", pid=pid)
        if status["exited"]:
            if status.get("exitcode", 1):
                said = _decoded(status.get("err-data", "")).strip() or f"code {status.get('exitcode')}"
                raise GuestRefused(f"{program} failed in the guest: {said}")
            return _decoded(status.get("out-data", ""))
        time.sleep(0.1)
    raise GuestRefused(f"{program} does not end in the guest")


def _decoded(data: str) -> str:
    return base64.b64decode(data).decode(errors="replace")
