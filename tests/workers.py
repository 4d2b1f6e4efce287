"""Which tests pytest's workers take as one piece: those that share real parts which are costly to start.

Of the conformance suite these are all tests of one storage; elsewhere a module's, whose guest or cluster they share.
"""

import re

from xdist.scheduler import LoadScopeScheduling

_CONFORMANCE = "tests/conformance/"


class ByRealParts(LoadScopeScheduling):
    """Gives each worker whole pieces, the largest first."""

    def __init__(self, config, log, storages):  # type: ignore[no-untyped-def]
        super().__init__(config, log)
        names = "|".join(re.escape(name) for name in sorted(storages, key=len, reverse=True))
        self._storage = re.compile(rf"[\[-]({names})[-\]]")

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        if module.startswith(_CONFORMANCE):
            found = self._storage.search(nodeid)
            return f"{_CONFORMANCE}{found[1]}" if found else module
        return module
