"""A process that works on a pool is killed (kill -9) in the middle of a change of the file system: the next one has its
locks at once, and finishes or undoes what it finds.

test_powercut.py has the states that this leaves at every operation; here the process and its locks are real.
"""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.faults import nfs_steps as steps
from tests.faults.nfs_steps import VOLUMES, Pool, digest, opened, stored_record
from tests.lab import state
from tests.lab.powercut.filesystem import CHANGING
from tests.lab.powercut.mount import PowercutMount

POINTS = 4
BY_NAME = {step.name: step for step in steps.STORY if isinstance(step, steps.Step)}


@pytest.fixture
def mount() -> Iterator[PowercutMount]:
    with PowercutMount(state.prepare() / "killed") as mounted:
        Pool(mounted.directory).fill()
        mounted.save("volumes")
        yield mounted
    state.release()


def begun(mount: PowercutMount) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults.nfs_steps", mount.directory],
        cwd=state.REPOSITORY,
        env=state.owned_environment(state.DEFAULT_STATE_DIR),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_who_is_killed_while_he_changes_something_leaves_what_the_next_one_finishes(mount: PowercutMount) -> None:
    mount.watch()
    with begun(mount) as whole:
        assert whole.wait(timeout=120) == 0
    changes = [at for at, call in enumerate(mount.heal(), 1) if call in CHANGING]
    assert len(changes) > 40
    for at in changes[:: len(changes) // POINTS]:
        mount.restore("volumes")
        content = {volume: digest(mount.directory / volume) for volume in VOLUMES}
        mount.hang(at)
        with begun(mount) as process:
            deadline = time.monotonic() + 120
            while not mount.is_hanging():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.kill()
            mount.heal()
            process.wait(timeout=60)
            assert process.stdout
            step = BY_NAME[process.stdout.read().split()[-1]]
        provider = opened(mount.directory)
        assert stored_record(provider, content) in step.during
        step.recover[0](provider)
        assert stored_record(provider, content) == step.end
        assert {volume: digest(mount.directory / volume) for volume in VOLUMES} == content
        (mount.directory / steps.CLONED).unlink(missing_ok=True)
        steps.delete(provider)
        provider.capabilities()
        steps.nothing_is_left(mount.directory)
        provider.close()
