"""`python -m tests.lab.powercut DIRECTORY`: mount there, say "ready", serve until unmounted or told to end."""

import signal
import sys

import pyfuse3
import trio

from tests.lab.powercut.filesystem import Recorded


async def serve() -> None:
    async with trio.open_nursery() as nursery:

        async def end_on_signal() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

        nursery.start_soon(end_on_signal)
        print("ready", flush=True)
        await pyfuse3.main(min_tasks=2, max_tasks=16)
        nursery.cancel_scope.cancel()


# without default_permissions: the kernel would ask for attributes in between, of the controlled directory too
options = {"fsname=powercut", "subtype=frostgate-lab", "allow_other"}
pyfuse3.init(Recorded(), sys.argv[1], options)
try:
    trio.run(serve)
finally:
    pyfuse3.close(unmount=True)
