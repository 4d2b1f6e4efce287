"""Calls that a verb makes to the file system fail, once or from then on: the answer is one of the contract's, volumes
stay as they are, nothing stays open, and a repeat, or the undoing, comes to a good end.

FROSTGATE_ERRNOS=all widens it: every errno at every call, instead of one errno in turn at each call, and at every
few calls of verbs that make many.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from providers.base import ProviderError
from providers.nfs import copying
from providers.nfs.provider import NfsProvider
from tests.faults import nfs_steps as steps
from tests.faults.nfs_steps import GROUP, VOLUMES, Pool, Step, delete, opened
from tests.faults.test_powercut import emulated_clone
from tests.lab import state
from tests.lab.powercut.disk import ROOT, Disk
from tests.lab.powercut.filesystem import CHANGING
from tests.lab.powercut.mount import PowercutMount

EVERY = os.environ.get("FROSTGATE_ERRNOS") == "all"
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSING_CHANGES = (*FULL, errno.EROFS)
ONCE = (errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EROFS, errno.EDQUOT, errno.EINTR)
LASTING = (errno.ESTALE, errno.ENOSPC, errno.EIO, errno.EROFS)


@dataclass(frozen=True)
class Case:
    """A verb, the saved pool it begins with, and the verbs before it."""

    step: Step
    pool: str
    before: tuple[Step, ...] = ()


CASES = (
    Case(steps.PREPARE, "volumes"),
    Case(steps.CUT, "volumes", (steps.PREPARE,)),
    Case(steps.SETTLE, "volumes", (steps.PREPARE, steps.CUT)),
    Case(steps.ABORT, "volumes", (steps.PREPARE, steps.CUT)),
    Case(steps.DESCRIBE, "snapshot"),
    Case(steps.CLONE, "snapshot"),
    Case(steps.STAGE, "snapshot"),
    Case(steps.UNSTAGE, "snapshot", (steps.STAGE,)),
    Case(steps.REVERT, "snapshot", (steps.STAGE,)),
    Case(steps.DELETE, "snapshot"),
)


@pytest.fixture(scope="module")
def mount() -> Iterator[PowercutMount]:
    """A mount with the pools "volumes" and "snapshot" saved; the volumes of the latter were written to since."""
    with PowercutMount(state.prepare() / "errnos") as mounted:
        pool = Pool(mounted.directory)
        pool.fill()
        mounted.save("volumes")
        provider = opened(mounted.directory)
        for step in (steps.PREPARE, steps.CUT, steps.SETTLE, steps.DESCRIBE):
            step.run(provider)
        provider.close()
        pool.guest_writes("later")
        mounted.save("snapshot")
        yield mounted
    state.release()


@pytest.mark.parametrize("mode", ["clone", "copy"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.step.name)
def test_a_call_that_fails_harms_nothing(
    mount: PowercutMount, case: Case, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "clone":
        monkeypatch.setattr(copying, "clone", emulated_clone)
    lasting = mode == "copy"
    numbers = LASTING if lasting else ONCE
    calls = attempt(mount, case, 0, 0, lasting=False)
    assert len(calls) > 5
    stride = max(1, len(calls) // (16 if lasting else 40))
    for at, call in enumerate(calls, 1):
        if at % stride and not EVERY:
            continue
        # a full or read-only file system refuses changes only
        possible = [number for number in numbers if lasting or call in CHANGING or number not in REFUSING_CHANGES]
        for number in possible if EVERY else (possible[at % len(possible)],):
            attempt(mount, case, at, number, lasting=lasting)


def attempt(mount: PowercutMount, case: Case, at: int, number: int, *, lasting: bool) -> list[str]:
    """Let one call fail, none when `at` is 0; returns the calls that the verb made."""
    mount.restore(case.pool)
    provider = opened(mount.directory)
    for step in case.before:
        step.run(provider)
    before = volumes(mount.record()[2])
    mount.fail(at, number, lasting=lasting, changing=number in REFUSING_CHANGES)
    failure: ProviderError | None = None
    try:
        case.step.run(provider)
    except ProviderError as error:
        failure = error
    except BaseException as error:
        error.add_note(told(case, at, number, mount.heal()))
        raise
    calls = mount.heal()
    try:
        judge(mount.record()[2], case, before, failure, number)
        go_on(mount, provider, case, before, failure)
    except Exception as error:
        error.add_note(f"{told(case, at, number, calls)}: {failure!r}")
        raise
    provider.close()
    assert not still_open(mount.directory), told(case, at, number, calls)
    return calls


def still_open(directory: Path) -> list[str]:
    """What this process has open below a directory."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [path for path in found if path.startswith(str(directory))]


def judge(disk: Disk, case: Case, before: dict[str, bytes], failure: ProviderError | None, number: int) -> None:
    if failure is None:
        assert stored_record(disk) == case.step.after
    else:
        assert failure.reason == ("POOL_FULL" if number in FULL else "POOL_UNAVAILABLE")
        assert stored_record(disk) in case.step.during
    cloned = disk.at(steps.CLONED)
    assert cloned is None or bytes(cloned.data) == then(VOLUMES[0])
    for volume, found in volumes(disk).items():
        assert found in ((before[volume], then(volume)) if case.step.reverts else (before[volume],))


def go_on(
    mount: PowercutMount, provider: NfsProvider, case: Case, before: dict[str, bytes], failure: ProviderError | None
) -> None:
    step = case.step
    (step.recover[0] if failure else step.go_on)(provider)
    disk = mount.record()[2]
    assert stored_record(disk) in ((step.end, None) if step.name == "settle" else (step.end,))
    expected = {volume: then(volume) for volume in VOLUMES} if step.reverts else before
    assert volumes(disk) == expected
    if step is steps.CLONE:
        cloned = disk.at(steps.CLONED)
        assert cloned
        assert bytes(cloned.data) == then(VOLUMES[0])
        (mount.directory / steps.CLONED).unlink()
    delete(provider)
    left = mount.record()[2]
    assert set(left.nodes[ROOT].entries) <= {*VOLUMES, ".frostgate"}
    snapshots = left.at(".frostgate")
    assert snapshots is None or set(snapshots.entries) <= {".lock", ".probe"}


def volumes(disk: Disk) -> dict[str, bytes]:
    found = {}
    for volume in VOLUMES:
        node = disk.at(volume)
        assert node, f"{volume} is gone"
        assert node.xattrs == {"user.note": volume.encode()}
        assert (node.uid, node.gid) == (107 + VOLUMES.index(volume), 108)
        found[volume] = bytes(node.data)
    return found


def then(volume: str) -> bytes:
    """What a volume was when the snapshot was taken."""
    return (f"{volume} before ".encode() * steps.BYTES)[: steps.BYTES]


def stored_record(disk: Disk) -> bytes | None:
    """The record of the snapshot on the disk, None without one; it has to be whole then."""
    manifest = disk.at(f".frostgate/{GROUP}/.manifest.json")
    if manifest is None:
        return None
    for volume in VOLUMES:
        member = disk.at(f".frostgate/{GROUP}/{volume}")
        assert member, f"{volume} is missing"
        assert bytes(member.data) == then(volume)
    record: str = json.loads(bytes(manifest.data))["record"]
    return record.encode()


def told(case: Case, at: int, number: int, calls: list[str]) -> str:
    return f"{case.step.name}, call {at} fails with {errno.errorcode.get(number)}: {' '.join(calls)}"


def test_a_pool_that_was_stale_works_again(mount: PowercutMount) -> None:
    mount.restore("volumes")
    provider = opened(Path(mount.directory))
    mount.fail(1, errno.ESTALE, lasting=True)
    for verb in (
        provider.space,
        provider.capabilities,
        lambda: provider.volumes("", 10),
        lambda: provider.volume("a.raw"),
        lambda: list(provider.snapshots()),
        lambda: list(provider.leftovers()),
        lambda: provider.prepare(steps.SPEC),
        lambda: provider.open(GROUP, "a.raw"),
    ):
        with pytest.raises(ProviderError) as caught:
            verb()
        assert caught.value.reason == "POOL_UNAVAILABLE"
    mount.heal()
    assert [volume.name for volume in provider.volumes("", 10)] == list(VOLUMES)
    for step in (steps.PREPARE, steps.CUT, steps.SETTLE):
        step.run(provider)
    assert [group.group for group in provider.snapshots()] == [GROUP]
    delete(provider)
    provider.close()
