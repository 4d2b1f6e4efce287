"""Loop devices over images, freed whatever happens."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def attached(*images: Path, offset: int = 0, size_bytes: int = 0) -> Iterator[tuple[str, ...]]:
    """Attach images, or a range of each, to loop devices; yields the devices."""
    limits = ["--offset", str(offset), *(["--sizelimit", str(size_bytes)] if size_bytes else [])]
    with ExitStack() as stack:
        devices = []
        for image in images:
            done = subprocess.run(
                ["losetup", "--find", "--show", *limits, image], check=True, capture_output=True, text=True
            )
            device = done.stdout.strip()
            stack.callback(subprocess.run, ["losetup", "--detach", device], check=True)
            devices.append(device)
        yield tuple(devices)
