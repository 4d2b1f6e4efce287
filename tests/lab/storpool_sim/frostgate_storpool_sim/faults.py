"""What is made to go wrong, and how often each call was made: for tests.

Over HTTP, below /admin, with the API's token, and only when the simulator was started with --admin:

    GET /admin/calls           {"calls": {"VolumesGroupSnapshot": 1, ...}}; DELETE begins again
    GET, DELETE /admin/faults  what is still to come; forget it
    POST /admin/faults         one Fault as JSON
    POST /admin/capacity       {"bytes": N}: the cluster has this much room from now on
"""

from __future__ import annotations

import fnmatch
import threading
from collections import Counter
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from frostgate_storpool_sim.errors import Refused
from frostgate_storpool_sim.routes import Route

Kind = Literal["delay", "delay-after", "error", "error-after", "half", "cut-before", "cut-after"]


class Fault(BaseModel):
    """One thing that goes wrong with the next `count` calls that match `method`.

    `method` is a pattern (fnmatch) of the query's name ("VolumesGroupSnapshot") or the bindings'
    ("snapshotCreateGroup").

    delay, delay-after        `delay_s` before, after the effect
    error, error-after        the error `name`, `descr`, `transient` without, after the effect
    half                      the effect on the first half of the call's volumes, then that error
    cut-before, cut-after     the connection is cut without, after the effect
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    kind: Kind
    count: int = Field(default=1, ge=1)
    delay_s: float = Field(default=0.0, ge=0.0, le=3600.0)
    name: str = "internalError"
    descr: str = "injected"
    transient: bool = False

    def error(self) -> Refused:
        """Return the error."""
        return Refused(self.name, self.descr, transient=self.transient)

    def matches(self, route: Route) -> bool:
        """Whether it is for a call."""
        return any(fnmatch.fnmatchcase(name, self.method) for name in (route.query, route.function))


class Faults:
    """Counts calls and hands out faults. Any thread."""

    def __init__(self) -> None:
        """Nothing goes wrong."""
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._calls: Counter[str] = Counter()

    def add(self, fault: Fault) -> None:
        """Let something go wrong."""
        with self._lock:
            self._faults.append(fault)

    def take(self, route: Route) -> list[Fault]:
        """Count a call, and return what goes wrong with it."""
        with self._lock:
            self._calls[route.query] += 1
            found = [fault for fault in self._faults if fault.matches(route)]
            for fault in found:
                fault.count -= 1
            self._faults = [fault for fault in self._faults if fault.count]
            return found

    def calls(self) -> dict[str, int]:
        """Return how often each call was made."""
        with self._lock:
            return dict(self._calls)

    def forget_calls(self) -> None:
        """Count from zero."""
        with self._lock:
            self._calls.clear()

    def waiting(self) -> list[Fault]:
        """Return what is still to go wrong."""
        with self._lock:
            return list(self._faults)

    def forget(self) -> None:
        """Let nothing more go wrong."""
        with self._lock:
            self._faults.clear()
