"""Waiting for conditions: tests assert no times, and give a busy machine all it may need."""

import time
from collections.abc import Callable


def wait(condition: Callable[[], object], timeout_s: float = 60, every_s: float = 0.05) -> None:
    """Return when the condition holds; fail when it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain"
        time.sleep(every_s)
