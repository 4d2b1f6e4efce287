"""Work of a provider on several volumes at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from providers.base import PoolFull
from providers.parallel import together


def test_results_come_in_order_and_all_of_it_runs_at_once() -> None:
    met = threading.Barrier(3, timeout=60)
    with ThreadPoolExecutor(3) as executor:
        assert together(executor, [lambda n=n: (met.wait(), n)[1] for n in range(3)]) == [0, 1, 2]
        assert together(executor, [lambda: "alone"]) == ["alone"]
        assert together(executor, []) == []


def test_an_error_is_raised_when_nothing_runs_any_more() -> None:
    failed, ended = threading.Event(), threading.Event()

    def fail() -> None:
        failed.set()
        raise PoolFull("no room")

    def last() -> None:
        assert failed.wait(60)
        ended.set()

    with ThreadPoolExecutor(2) as executor:
        with pytest.raises(PoolFull):
            together(executor, [fail, last])
        assert ended.is_set()
