"""The states that a power cut can leave, from the record of what was done.

What was synced is there. Of the rest any part can be: everything or nothing, the data or the names or the attributes
only, everything but one operation, one operation only, the first ones, half of a write, and more by chance.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tests.lab.powercut.disk import Attributes, Disk, Mark, Names, Operation, Sync, Truncate, Write, Xattr

_SECTOR = 512
"""What a disk writes as a whole or not at all."""


@dataclass(frozen=True)
class State:
    """One state: the operations before the cut, what it shows of the unsynced ones, and the disk."""

    at: int
    kept: str
    disk: Disk
    is_whole: bool
    """Nothing is lost: what a process that was killed there leaves."""


def states(base: Disk, operations: Sequence[Operation], at: int, chances: int, seed: int) -> Iterator[State]:
    """Yield the states after a power cut when `at` operations were done; the whole one first, no state twice."""
    done = operations[:at]
    durable = _durable(done)
    pending = [number for number, operation in enumerate(done) if number not in durable and _changes(operation)]
    first = pending[0] if pending else at
    before = base.copy()
    for operation in done[:first]:
        before.apply(operation)
    seen = set()
    for kept, torn, why in _choices(done, pending, chances, random.Random(seed)):
        disk = before.copy()
        for number, operation in enumerate(done[first:], first):
            if number in durable or number in kept:
                disk.apply(operation)
            elif number == torn and isinstance(operation, Write):
                disk.apply(_torn(operation, why))
        digest = disk.digest()
        if digest not in seen:
            seen.add(digest)
            yield State(at, why, disk, is_whole=len(kept) == len(pending))


def _torn(write: Write, how: str) -> Write:
    """Return what there can be of a write: its time without its data, its size with half of them, half of it."""
    half = write.data[: len(write.data) // 2]
    if "time" in how or len(write.data) <= _SECTOR:
        return replace(write, data=b"")
    return replace(write, data=half + bytes(len(write.data) - len(half)) if "zeros" in how else half)


def _durable(done: Sequence[Operation]) -> set[int]:
    """Return the numbers of the operations that an fsync after them made durable."""
    found: set[int] = set()
    for position, sync in enumerate(done):
        if not isinstance(sync, Sync):
            continue
        for number, operation in enumerate(done[:position]):
            match operation:
                case Names(changes=changes):
                    if any(directory == sync.inode for directory, _, _ in changes):
                        found.add(number)
                case Write(inode=inode) | Truncate(inode=inode):
                    if inode == sync.inode:
                        found.add(number)
                case Attributes(inode=inode) | Xattr(inode=inode):
                    if inode == sync.inode and not sync.only_data:
                        found.add(number)
    return found


def _changes(operation: Operation) -> bool:
    return not isinstance(operation, Sync | Mark)


def _choices(
    done: Sequence[Operation], pending: list[int], chances: int, chance: random.Random
) -> Iterator[tuple[set[int], int | None, str]]:
    everything = set(pending)
    names = {number for number in pending if isinstance(done[number], Names)}
    data = {number for number in pending if isinstance(done[number], Write | Truncate)}
    attributes = everything - names - data
    yield everything, None, "everything"
    yield set(), None, "nothing"
    yield names, None, "only names"
    yield everything - names, None, "all but names"
    yield everything - data, None, "all but data"
    yield everything - attributes, None, "all but attributes"
    for number in pending:
        yield everything - {number}, None, f"all but {number}"
        yield {number}, None, f"only {number}"
        yield {other for other in pending if other < number}, number, f"until {number}, torn"
        if number in data:
            yield everything - {number}, number, f"all, {number} torn"
            yield everything - {number}, number, f"all, {number} half zeros"
            yield everything - {number}, number, f"all, of {number} only the time"
    for count in range(chances):
        yield {number for number in pending if chance.random() < 0.5}, None, f"by chance {count}"
