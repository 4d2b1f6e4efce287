"""Several calls to a storage at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any


def together(executor: Executor, work: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run everything at once; return the results in order, or raise the first error after all have ended."""
    if len(work) == 1:
        return [work[0]()]
    begun = [executor.submit(part) for part in work]
    errors = [error for part in begun if (error := part.exception())]
    if errors:
        raise errors[0]
    return [part.result() for part in begun]
