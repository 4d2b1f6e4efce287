"""Real file systems that are full at every step, and that turn read-only: nothing half is left, volumes stay."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from providers.base import PoolFull, PoolUnavailable
from tests.faults import nfs_steps as steps
from tests.faults.nfs_steps import GROUP, VOLUMES, Step, opened
from tests.lab import state
from tests.lab.disk import sha256
from tests.lab.filesystems import mount_filesystem

MIB = 1 << 20
FREE_KIB = (0, 4, 8, 12, 16, 24, 32, 64, 128, 512, 1024, 1600, 2304, 3072, 4160, 6144)
TAKING = (steps.PREPARE, steps.CUT, steps.SETTLE)


@pytest.fixture(scope="module", params=["xfs", "ext4"])
def small(request: pytest.FixtureRequest) -> Iterator[Path]:
    """32 MiB and more, with two volumes of a MiB."""
    size = 320 * MIB if request.param == "xfs" else 32 * MIB
    with mount_filesystem(request.param, state.prepare() / f"full-{request.param}", size) as mounted:
        for path in mounted.directory.glob("lost+found"):
            path.rmdir()
        for volume in VOLUMES:
            (mounted.directory / volume).write_bytes(os.urandom(MIB))
        yield mounted.directory
    state.release()


def fill(root: Path, free_kib: int) -> None:
    """Leave about so much room, by a file that no verb looks at."""
    filler = root / ".filler"
    filler.unlink(missing_ok=True)
    with filler.open("wb", buffering=0) as file:
        space = os.statvfs(root)
        with suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize)
        end = os.lseek(file.fileno(), 0, os.SEEK_END)
        for size in (MIB, 65536, 4096):
            with suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), end, size)
                    end += size
        os.ftruncate(file.fileno(), max(0, end - free_kib * 1024))
        os.fsync(file.fileno())


@pytest.mark.parametrize("verbs", ["take", "describe", "revert", "clone"])
def test_a_full_file_system_refuses_or_does_it_whole(small: Path, verbs: str) -> None:
    before = {volume: sha256(small / volume) for volume in VOLUMES}
    provider = opened(small)
    if verbs != "take":
        for step in TAKING:
            step.run(provider)
    outcomes = []
    for free_kib in FREE_KIB:
        fill(small, free_kib)
        outcomes.append(attempt(small, verbs))
        assert {volume: sha256(small / volume) for volume in VOLUMES} == before
    assert outcomes[-1] == "done"
    if not provider.capabilities().instant_cut and verbs != "describe":
        assert outcomes[0] == "full"
    (small / ".filler").unlink()
    provider.delete(GROUP, steps.ignored)
    provider.close()
    steps.nothing_is_left(small)


def attempt(root: Path, verbs: str) -> str:
    """Do it, as a gateway that undoes what fails, and undo it as well when it is done."""
    provider = opened(root)
    try:
        if verbs == "take":
            for step in TAKING:
                step.run(provider)
            assert [group.group for group in provider.snapshots()] == [GROUP]
            for volume in VOLUMES:
                assert sha256(root / ".frostgate" / GROUP / volume) == sha256(root / volume)
        elif verbs == "describe":
            provider.describe(GROUP, b"x" * 10_000)
        elif verbs == "clone":
            steps.clone(provider)
            assert sha256(root / steps.CLONED) == sha256(root / VOLUMES[0])
        else:
            steps.stage(provider)
            steps.revert(provider)
    except PoolFull:
        outcome = "full"
    else:
        outcome = "done"
    if verbs == "take":
        provider.abort(GROUP)
        provider.delete(GROUP, steps.ignored)
    else:
        provider.abort_revert(GROUP)
        (root / steps.CLONED).unlink(missing_ok=True)
        assert [group.group for group in provider.snapshots()] == [GROUP]
    provider.close()
    return outcome


def remount(root: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", root], check=True)


@pytest.mark.parametrize(
    "after", [None, steps.SETTLE, steps.DESCRIBE, steps.STAGE], ids=lambda step: step.name if step else "nothing"
)
def test_a_pool_that_turns_read_only_refuses_in_words_and_goes_on_when_it_is_writable(
    small: Path, after: Step | None
) -> None:
    before = {volume: sha256(small / volume) for volume in VOLUMES}
    provider = opened(small)
    story = [*TAKING, steps.DESCRIBE, steps.STAGE, steps.REVERT]
    done = story[: story.index(after) + 1] if after else []
    for step in done:
        step.run(provider)
    provider.close()  # what it has open for writing would keep the file system from it
    provider = opened(small)
    remount(small, "ro")
    try:
        for verb in (story[len(done)].run, lambda p: p.delete(GROUP, steps.ignored)):
            if after is None and verb is not story[0].run:
                continue  # there is nothing to delete
            with pytest.raises(PoolUnavailable, match="mount it writable"):
                verb(provider)
        assert [volume.name for volume in provider.volumes("", 10)] == list(VOLUMES)
        if after:
            with provider.open(GROUP, VOLUMES[0]) as reader:
                assert reader.read(0, 4096) == (small / VOLUMES[0]).read_bytes()[:4096]
    finally:
        remount(small, "rw")
    for step in story[len(done) :]:
        step.run(provider)
    provider.delete(GROUP, steps.ignored)
    provider.close()
    assert {volume: sha256(small / volume) for volume in VOLUMES} == before
    steps.nothing_is_left(small)
