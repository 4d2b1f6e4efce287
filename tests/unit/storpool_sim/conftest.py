"""One simulator a module, and short words for what tests ask of it."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from storpool import spapi

from tests.lab import state
from tests.lab.storpool import StorpoolSim

MIB = 1 << 20
unused = (f"v{number}" for number in itertools.count())
"""Names that nothing has."""


@pytest.fixture(scope="module")
def running() -> Iterator[StorpoolSim]:
    with StorpoolSim("storpool-unit", other_cluster="backup=sim.c", capacity_gib=4) as made:
        yield made
        assert "Traceback" not in made.log()
    state.release()


@pytest.fixture
def sim(running: StorpoolSim) -> Iterator[StorpoolSim]:
    yield running
    running.forget_faults()


@pytest.fixture
def name() -> str:
    return next(unused)


def refusal(call: Callable[[], object]) -> spapi.ApiError:
    with pytest.raises(spapi.ApiError) as refused:
        call()
    error: spapi.ApiError = refused.value
    return error


def names(listed: list[Any]) -> set[str]:
    return {found.name for found in listed}
