"""The verbs of the nfs provider, one after another on one pool: what has to hold in the middle of each, and after it.

What a test does to them (cut the power, let calls fail, kill) is its own affair; here is how a gateway goes on from
there, and what an operator may expect.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from providers.base import GroupSpec, SnapshotNotFound, VolumeChanged, VolumeExists, VolumeSpec
from providers.nfs.options import NfsOptions
from providers.nfs.provider import NfsProvider

GROUP = "g"
VOLUMES = ("a.raw", "b.raw")
CLONED = "c.raw"
"""What is made of the first; a test removes it."""
FIRST, SECOND = b"the first record", b"the second record"
SPEC = GroupSpec(GROUP, tuple(VolumeSpec(volume) for volume in VOLUMES))
NOW = datetime(2026, 1, 1, tzinfo=UTC)
BYTES = 12288

Verb = Callable[[NfsProvider], None]


def ignored(_done: int, _total: int) -> None:
    """No progress is shown."""


def settle(provider: NfsProvider) -> None:
    provider.settle(GROUP, NOW, FIRST, ignored)


def settle_or_abort(provider: NfsProvider) -> None:
    """What the gateway does after a restart."""
    try:
        settle(provider)
    except VolumeChanged:
        provider.abort(GROUP)


def stage(provider: NfsProvider) -> None:
    provider.prepare_revert(GROUP, VOLUMES, ignored)


def stage_and_abort(provider: NfsProvider) -> None:
    stage(provider)
    provider.abort_revert(GROUP)


def revert(provider: NfsProvider) -> None:
    provider.revert(GROUP, VOLUMES, ignored)


def abort(provider: NfsProvider) -> None:
    provider.abort(GROUP)


def abort_leftovers(provider: NfsProvider) -> None:
    """What reconcile does without a journal."""
    for group in list(provider.leftovers()):
        provider.abort(group)


def delete(provider: NfsProvider) -> None:
    provider.delete(GROUP, ignored)


def clone(provider: NfsProvider) -> None:
    provider.clone(GROUP, VOLUMES[0], CLONED, ignored)


def clone_again(provider: NfsProvider) -> None:
    """A state that was carried to another file system does not know its clones any more: they stay as they are."""
    with suppress(VolumeExists):
        clone(provider)


@dataclass(frozen=True)
class Step:
    """A verb; `during` and `after` say what of the snapshot there is: its possible records, None for no snapshot.

    `recover` is what a gateway does that died during it, `go_on` one that died after it; then there is `end`.
    """

    name: str
    run: Verb
    during: tuple[bytes | None, ...]
    after: bytes | None
    recover: tuple[Verb, ...]
    go_on: Verb
    end: bytes | None
    reverts: bool = False


PREPARE = Step("prepare", lambda p: void(p.prepare(SPEC)), (None,), None, (abort, abort_leftovers), abort, None)
CUT = Step("cut", lambda p: void(p.cut(GROUP)), (None,), None, (abort, abort_leftovers), abort, None)
SETTLE = Step("settle", settle, (None, FIRST), FIRST, (settle_or_abort,), settle, FIRST)
DESCRIBE = Step(
    "describe",
    lambda p: p.describe(GROUP, SECOND),
    (FIRST, SECOND),
    SECOND,
    (lambda p: p.describe(GROUP, SECOND),),
    lambda p: p.describe(GROUP, SECOND),
    SECOND,
)
STAGE = Step("prepare_revert", stage, (SECOND,), SECOND, (stage_and_abort,), stage_and_abort, SECOND)
UNSTAGE = Step(
    "abort_revert",
    lambda p: p.abort_revert(GROUP),
    (SECOND,),
    SECOND,
    (lambda p: p.abort_revert(GROUP),),
    lambda p: p.abort_revert(GROUP),
    SECOND,
)
REVERT = Step("revert", revert, (SECOND,), SECOND, (revert,), revert, SECOND, reverts=True)
DELETE = Step("delete", delete, (SECOND, None), None, (delete,), delete, None)
CLONE = Step("clone", clone, (SECOND,), SECOND, (clone_again,), clone_again, SECOND)
ABORT = Step("abort", abort, (None,), None, (abort, abort_leftovers), abort, None)

STORY: tuple[Step | str, ...] = (
    PREPARE,
    ABORT,
    PREPARE,
    CUT,
    ABORT,
    PREPARE,
    CUT,
    "the guest writes on, where the cut is a clone",
    SETTLE,
    DESCRIBE,
    CLONE,
    "the guest writes",
    STAGE,
    UNSTAGE,
    STAGE,
    REVERT,
    DELETE,
)


def void(_value: object) -> None:
    """Nothing is done with it."""


@dataclass(frozen=True)
class Seen:
    """A volume as its user sees it."""

    content: str
    mode: int
    owner: tuple[int, int]
    note: bytes


@dataclass
class Pool:
    """A pool from outside."""

    root: Path

    def fill(self) -> None:
        """Make the volumes, synced."""
        for number, volume in enumerate(VOLUMES):
            write(self.root / volume, f"{volume} before ".encode())
            os.setxattr(self.root / volume, "user.note", volume.encode())
            os.chown(self.root / volume, 107 + number, 108)
            (self.root / volume).chmod(0o640)

    def guest_writes(self, words: str) -> None:
        """What a guest does that syncs, and an administrator."""
        for volume in VOLUMES:
            write(self.root / volume, f"{volume} {words} ".encode())
            (self.root / volume).chmod(0o600)
            sync(self.root / volume)
        (self.root / CLONED).unlink(missing_ok=True)
        sync(self.root)

    def guest_leaves_unsynced(self) -> None:
        """What is in nothing but the page cache at the cut."""
        with (self.root / VOLUMES[0]).open("r+b") as file:
            file.write(b"not synced")

    def seen(self) -> dict[str, Seen]:
        """The volumes now."""
        return {volume: seen(self.root / volume) for volume in VOLUMES}


def write(path: Path, words: bytes) -> None:
    """Overwrite the whole file; synced."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write((words * BYTES)[:BYTES])
    sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def seen(path: Path) -> Seen:
    status = path.stat()
    note = b""
    with suppress(OSError):
        note = os.getxattr(path, "user.note")
    return Seen(digest(path), status.st_mode & 0o7777, (status.st_uid, status.st_gid), note)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def opened(root: Path) -> NfsProvider:
    return NfsProvider("pool", NfsOptions(root=root))


def stored_record(provider: NfsProvider, cut_content: dict[str, str]) -> bytes | None:
    """The record of the snapshot, None without one; it has to be whole then, as a file and as it is read."""
    stored = {group.group: group for group in provider.snapshots()}
    assert set(stored) <= {GROUP}
    if not stored:
        for volume in VOLUMES:
            try:
                provider.open(GROUP, volume)
            except SnapshotNotFound:
                continue
            raise AssertionError("a snapshot that does not exist is read")
        return None
    found = stored[GROUP]
    assert [member.volume for member in found.members] == list(VOLUMES)
    for member in found.members:
        assert digest(Path(member.local_path)) == cut_content[member.volume], f"{member.volume} is not what was cut"
        with provider.open(GROUP, member.volume) as reader:
            read = reader.read(0, reader.size_bytes)
        assert hashlib.sha256(read).hexdigest() == cut_content[member.volume]
    return found.record


def nothing_is_left(root: Path) -> None:
    """In the pool are the volumes and the lock file."""
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    assert [name for name in left if name not in (".frostgate", ".frostgate/.lock")] == list(VOLUMES)


if __name__ == "__main__":  # a gateway's life, to be killed in: says each verb before it begins
    living = opened(Path(sys.argv[1]))
    for step in (PREPARE, CUT, SETTLE, DESCRIBE, CLONE, STAGE, REVERT, DELETE):
        print(step.name, flush=True)
        step.run(living)
