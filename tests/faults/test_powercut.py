"""The power is cut at every operation of every verb: volumes are whole, snapshots are whole or not there, and a new
gateway comes to an end that was promised.

FROSTGATE_POWERCUT_CHANCES widens it: that many more states by chance at every operation (2 by default).
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from providers.nfs import copying, layout
from tests.faults.nfs_steps import (
    ABORT,
    CLONE,
    CLONED,
    DELETE,
    SETTLE,
    STAGE,
    STORY,
    VOLUMES,
    Pool,
    Seen,
    Step,
    delete,
    digest,
    nothing_is_left,
    opened,
    revert,
    seen,
    stored_record,
)
from tests.lab import state
from tests.lab.filesystems import unmount
from tests.lab.powercut.disk import Disk, Mark, Operation
from tests.lab.powercut.mount import PowercutMount
from tests.lab.powercut.states import State, states

CHANCES = int(os.environ.get("FROSTGATE_POWERCUT_CHANCES", "2"))


@pytest.fixture
def lab() -> Iterator[Path]:
    directory = state.prepare() / "powercut"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "powercut", directory], check=True)
    yield directory
    unmount(directory)
    directory.rmdir()
    state.release()


def emulated_clone(source: int, target: int) -> None:
    """FUSE has no FICLONE; this does what it does as far as the disk is concerned: blocks that were never synced."""
    os.pwrite(target, os.pread(source, os.fstat(source).st_size, 0), 0)


@dataclass(frozen=True)
class Moment:
    """A step under way, or done, and what the volumes may be then."""

    step: Step
    is_done: bool
    volumes: tuple[dict[str, Seen], ...]
    after: tuple[dict[str, Seen], ...]


@dataclass(frozen=True)
class Story:
    """A recorded run of all steps."""

    base: Disk
    operations: list[Operation]
    steps: list[Moment]
    cut_content: dict[str, str]


def recorded(mount: PowercutMount, *, cloning: bool) -> Story:
    pool = Pool(mount.directory)
    pool.fill()
    mount.begin()
    unsynced = (pool.seen(),)
    pool.guest_leaves_unsynced()
    cut_content: dict[str, str] = {}
    moments: list[Moment] = []
    provider = opened(pool.root)
    for step in STORY:
        if isinstance(step, str):
            if cloning or "where the cut is a clone" not in step:
                pool.guest_writes(step)
                unsynced = ()
            continue
        before = pool.seen()
        if step.name == "cut":
            cut_content = {volume: digest(pool.root / volume) for volume in VOLUMES}
        mount.mark("begin")
        step.run(provider)
        mount.mark("end")
        after = pool.seen()
        if not step.reverts:
            assert after == before
        moments.append(Moment(step, False, (before, after, *unsynced), (after, *unsynced)))
    provider.close()
    base, operations, _ = mount.record()
    return Story(base, operations, moments, cut_content)


def moments(story: Story) -> Iterator[tuple[int, Moment]]:
    """Every number of operations after which something is under way or has just been done."""
    current = iter(story.steps)
    moment: Moment | None = None
    for number, operation in enumerate(story.operations, 1):
        if operation == Mark("begin"):
            moment = next(current)
            yield number, moment
        elif operation == Mark("end"):
            assert moment
            yield number, Moment(moment.step, True, moment.after, moment.after)
            moment = None
        elif moment:
            yield number, moment


def check(found: State, moment: Moment, story: Story, root: Path, turn: int) -> None:
    """Start a gateway on a state and see that it comes to a good end."""
    root.mkdir()
    found.disk.write_to(root)
    step, provider = moment.step, opened(root)
    assert_volumes(root, moment.volumes)
    if step is CLONE and ((root / CLONED).exists() or moment.is_done):
        assert seen(root / CLONED).content == story.cut_content["a.raw"]
    assert stored_record(provider, story.cut_content) in ((step.after,) if moment.is_done else step.during)
    if moment.is_done and step in (DELETE, ABORT):
        assert list(provider.leftovers()) == []
    if moment.is_done and step is STAGE:
        revert(provider)
        assert {volume: digest(root / volume) for volume in VOLUMES} == story.cut_content
    else:
        (step.go_on if moment.is_done else step.recover[turn % len(step.recover)])(provider)
        assert_volumes(root, moment.after)
    can_be_lost = step is SETTLE and not found.is_whole and not moment.is_done
    assert stored_record(provider, story.cut_content) in ((step.end, None) if can_be_lost else (step.end,))
    if step is CLONE:
        assert seen(root / CLONED).content == story.cut_content["a.raw"]
        assert seen(root / CLONED).owner == (107, 108)
        (root / CLONED).unlink()
    delete(provider)
    provider.capabilities()  # tries the file system again, over what a killed trial may have left
    nothing_is_left(root)
    provider.close()
    shutil.rmtree(root)


def assert_volumes(root: Path, possible: Sequence[dict[str, Seen]]) -> None:
    for volume in VOLUMES:
        assert seen(root / volume) in [volumes[volume] for volumes in possible], f"{volume} is half"


@pytest.mark.parametrize("mode", ["clone", "copy"])
def test_whatever_a_power_cut_leaves_is_whole_and_a_new_gateway_finishes_it(
    lab: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "clone":
        monkeypatch.setattr(copying, "clone", emulated_clone)
    with PowercutMount(lab / "pool") as mount:
        story = recorded(mount, cloning=mode == "clone")
    monkeypatch.setattr(
        os, "O_TMPFILE", os.O_DIRECTORY
    )  # states lie on a tmpfs: as little can be done there as by FUSE
    this_boot = layout.boot()
    checked: set[object] = set()
    reached = set()
    for number, moment in moments(story):
        for found in states(story.base, story.operations, number, CHANCES, seed=number):
            key = (moment.step.name, moment.is_done, moment.after[0]["a.raw"], found.is_whole, found.disk.digest())
            if key in checked:
                continue
            checked.add(key)
            # a process that was killed is started again in the same boot; after a power cut there is another one
            boot = this_boot if found.is_whole else "another boot"
            monkeypatch.setattr(layout, "boot", lambda boot=boot: boot)
            try:
                check(found, moment, story, lab / "state", len(checked))
            except Exception as error:
                around = "\n".join(map(shown, story.operations[max(0, number - 12) : number]))
                error.add_note(f"{moment.step.name}, done: {moment.is_done}; kept: {found.kept}; after:\n{around}")
                raise
        reached.add((moment.step.name, moment.is_done))
    assert reached == {(step.name, done) for step in STORY if isinstance(step, Step) for done in (False, True)}
    print(f"{mode}: {len(story.operations)} operations, {len(checked)} states")


def shown(operation: Operation) -> str:
    return str(operation)[:150]
