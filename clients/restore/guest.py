"""Putting one file back into a running guest, through its agent.

The file is written beside its place and moved there by the guest's own `mv`, with its owner and mode; where the
agent does not run programs (guest-exec is often forbidden), it stays beside it, and the caller is told.
Source: qemu-ga's guest-file-open, guest-file-write, guest-file-flush, guest-file-close, guest-exec.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

_CHUNK_BYTES = 48 * 1024
_ANSWER_S = 30
_PROGRAM_S = 60.0


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
    """Write a file in a guest. Repeatable. Raises GuestRefused, NoSuchVm."""
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

        beside = f"{path}.frostgate-restored"
        _write(agent, beside, parts, advance)
        try:
            _run(agent, "chown", [f"{owner[0]}:{owner[1]}", beside])
            _run(agent, "chmod", [f"{mode:o}", beside])
            _run(agent, "mv", ["-f", beside, path])
        except GuestRefused as error:
            raise GuestRefused(f"{error}; the file is in the guest as {beside}: move it by hand") from None
    finally:
        connection.close()


def _domain(connection: Any, vm: str) -> Any:
    import libvirt

    try:
        return connection.lookupByName(vm)
    except libvirt.libvirtError:
        return connection.lookupByUUIDString(vm)


def _write(agent: Callable[..., Any], path: str, parts: Iterable[bytes], advance: Callable[[int], None]) -> None:
    handle = agent("guest-file-open", path=path, mode="w")
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


def _run(agent: Callable[..., Any], program: str, words: list[str]) -> None:
    pid = agent("guest-exec", path=program, arg=words)["pid"]
    deadline = time.monotonic() + _PROGRAM_S
    while time.monotonic() < deadline:
        status = agent("guest-exec-status", pid=pid)
        if status["exited"]:
            if status.get("exitcode", 1):
                raise GuestRefused(f"{program} failed in the guest with code {status.get('exitcode')}")
            return
        time.sleep(0.1)
    raise GuestRefused(f"{program} does not end in the guest")
