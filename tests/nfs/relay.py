"""The tests of this directory run in a guest, because this machine's kernel has no NFS. Pytest shows them as its own.

run_in_guest() starts the guest, gives it the names of the tests that were collected here, and hands every report that
the guest's pytest makes to this one, as it comes. `python -m tests.nfs.relay NAMES` is the guest's side.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import pytest

from tests.lab.mirror_guest import MirrorGuest
from tests.lab.state import REPOSITORY

IN_GUEST = "FROSTGATE_IN_NFS_GUEST"
_SILENCE_S = 1000
_TEST_S = 900
"""Generous, for a guest without hardware virtualisation on a busy machine."""

_DISKS_BYTES = (4 << 30, 3 << 30)
_CONSOLE_CHARACTERS = 6000


def run_in_guest(session: pytest.Session) -> None:
    """Run the session's tests in a guest of their own; every test has an outcome afterwards."""
    waiting = {item.nodeid: item for item in session.items}
    with MirrorGuest("nfs", disks_bytes=_DISKS_BYTES) as guest:
        python = Path(sys.prefix) / "bin" / "python"
        command = ["env", "-C", REPOSITORY, f"{IN_GUEST}=yes", python, "-m", "tests.nfs.relay", *waiting]
        try:
            for line in guest.run(command, _SILENCE_S):
                _relay(session.config, waiting, json.loads(line))
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
        except (OSError, ValueError) as error:
            why = f"the guest fell silent: {error!r}"
        else:
            why = "the guest ended without it"
        for item in waiting.values():
            _report_missing(item, f"{why}\n\n{guest.console()[-_CONSOLE_CHARACTERS:]}")


def _relay(config: pytest.Config, waiting: dict[str, pytest.Item], line: Mapping[str, Any]) -> None:
    if line["kind"] == "start":
        config.hook.pytest_runtest_logstart(nodeid=line["nodeid"], location=tuple(line["location"]))
    elif line["kind"] == "finish":
        waiting.pop(line["nodeid"], None)
        config.hook.pytest_runtest_logfinish(nodeid=line["nodeid"], location=tuple(line["location"]))
    else:
        report = config.hook.pytest_report_from_serializable(config=config, data=line["report"])
        report.location = tuple(report.location)
        config.hook.pytest_runtest_logreport(report=report)


def _report_missing(item: pytest.Item, why: str) -> None:
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    report = pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", why, "setup")
    item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


class Reporter:
    """The guest's side: a pytest plugin that writes one line of JSON for everything that the host is to know."""

    def __init__(self, to: TextIO) -> None:
        self._to = to
        self._config: pytest.Config | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._say(kind="start", nodeid=nodeid, location=location)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        assert self._config
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._say(kind="report", report=data)

    def pytest_runtest_logfinish(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._say(kind="finish", nodeid=nodeid, location=location)

    def _say(self, **line: Any) -> None:
        print(json.dumps(line), file=self._to, flush=True)


def main(names: list[str]) -> int:
    """Run the tests; standard output is the host's, all else goes to the console."""
    to_host = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # what other tests need and an emulated CPU takes long to import is left out
    plain = [f"-pno:{plugin}" for plugin in ("cacheprovider", "hypothesispytest", "rerunfailures", "xdist")]
    return pytest.main(
        ["-v", *plain, "--confcutdir=tests/nfs", f"--timeout={_TEST_S}", *names], plugins=[Reporter(to_host)]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
