"""The bytes of volumes and snapshots: layers of 4 KiB chunks, each upon a parent.

A layer has the chunks that were written since it was made; all others are its parent's. So a snapshot costs the same
for any size: the volume's layer is left alone from then on, and the volume gets a new one upon it.

On disk a layer is two sparse files: `data`, with every chunk at its own offset, and `map`, with one byte a chunk,
1 when the layer has it. The map is written after the data, both through the kernel's page cache, so that kill -9 loses
nothing that was acknowledged.

Nothing here locks: the cluster does.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 4096
_PRESENT = b"\x01"
_RUNS = re.compile(rb"\x00+|\x01+", re.DOTALL)
_COPY_BYTES = 1 << 20


class Layer:
    """What was written to a volume from one snapshot to the next. Offsets and lengths are in bytes.

    `shown` is how much of the parent shows through: a volume that shrank and grows again must not get its old end.
    """

    def __init__(self, directory: Path, parent: Layer | None, size_bytes: int, shown: int) -> None:
        """Open the layer in a directory, or make it."""
        self.directory = directory
        self.parent = parent
        self.size_bytes = size_bytes
        self.shown = shown if parent else 0
        self._writes = self._synced = 0
        directory.mkdir(exist_ok=True)
        self._data = os.open(directory / "data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._data, size_bytes)
        with (directory / "map").open("a+b") as file:
            file.truncate(_chunks(size_bytes))
            self._map = mmap.mmap(file.fileno(), _chunks(size_bytes))
        self.own_chunks = self._map[:].count(_PRESENT)

    @property
    def name(self) -> str:
        """The layer's name in its store."""
        return self.directory.name

    def read(self, offset: int, length: int) -> bytes:
        """Return what a reader of the volume sees; zeros past the layer's end."""
        answer = bytearray(length)
        view = memoryview(answer)
        wanted: list[tuple[Layer, int, int]] = [(self, offset, offset + length)]
        while wanted:  # no recursion: there may be thousands of snapshots
            layer, begin, end = wanted.pop()
            for present, first, last in layer._runs_between(begin, min(end, layer.size_bytes)):
                if present:
                    _read_exactly(layer._data, view[first - offset : last - offset], first)
                elif layer.parent is not None and first < layer.shown:
                    wanted.append((layer.parent, first, min(last, layer.shown)))
        return bytes(answer)

    def write(self, offset: int, content: bytes) -> None:
        """Write within the layer's size."""
        first, last = offset // CHUNK_BYTES, (offset + len(content) - 1) // CHUNK_BYTES
        begin, end = first * CHUNK_BYTES, min((last + 1) * CHUNK_BYTES, self.size_bytes)
        head = self._missing(first, begin, offset)
        tail = self._missing(last, offset + len(content), end)
        os.pwritev(self._data, [head, content, tail], offset - len(head))
        self.own_chunks += self.new_chunks(offset, len(content))
        self._map[first : last + 1] = _PRESENT * (last + 1 - first)
        self._writes += 1

    def new_chunks(self, offset: int, length: int) -> int:
        """How many chunks a write would add to those that the layer has."""
        return self._map[offset // CHUNK_BYTES : (offset + length - 1) // CHUNK_BYTES + 1].count(b"\x00")

    def resize(self, size_bytes: int) -> None:
        """Grow with zeros, or shrink, forgetting what was beyond."""
        if size_bytes < self.size_bytes:
            self._cut_off(size_bytes)
        os.ftruncate(self._data, size_bytes)
        self._map.resize(_chunks(size_bytes))
        self.size_bytes = size_bytes
        self.own_chunks = self._map[:].count(_PRESENT)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield (first chunk, number) of what this layer has itself, ascending."""
        for run in _RUNS.finditer(self._map):
            if run[0][:1] == _PRESENT:
                yield run.start(), run.end() - run.start()

    def seen_bytes(self) -> int:
        """How much of the volume was ever written, in this layer and those that show through."""
        seen, layer, chunks = 0, self, len(self._map)
        while True:
            seen |= int.from_bytes(layer._map[:chunks], "little")
            chunks = min(chunks, _chunks(layer.shown))
            if layer.parent is None:
                return CHUNK_BYTES * seen.bit_count()
            layer = layer.parent

    def take_over(self, first: int, count: int) -> None:
        """Copy those of some of the parent's chunks that show through: the parent is needed no more for them."""
        assert self.parent
        limit = min(first + count, self.shown // CHUNK_BYTES + bool(self.shown % CHUNK_BYTES), len(self._map))
        for at in range(first, limit):
            if not self._map[at] and self.parent.has(at):
                length = min(CHUNK_BYTES, self.size_bytes - at * CHUNK_BYTES)
                self.write(at * CHUNK_BYTES, self.read(at * CHUNK_BYTES, length))

    def has(self, chunk: int) -> bool:
        """Whether this layer has a chunk itself."""
        return chunk < len(self._map) and self._map[chunk] == 1

    def skip_parent(self) -> None:
        """Let the parent's parent show through in its place; what the parent itself had is taken over already."""
        assert self.parent
        self.shown = min(self.shown, self.parent.shown)
        self.parent = self.parent.parent

    def unsynced(self) -> list[Unsynced]:
        """Return what has to be synced, here and in the parents."""
        found: list[Unsynced] = []
        layer: Layer | None = self
        while layer is not None:
            if layer._synced < layer._writes:
                files = [os.open(layer.directory / name, os.O_RDONLY | os.O_CLOEXEC) for name in ("data", "map")]
                found.append(Unsynced(layer, layer._writes, *files))
            layer = layer.parent
        return found

    def synced(self, writes: int) -> None:
        """So many writes are on the disk."""
        self._synced = max(self._synced, writes)

    def close(self) -> None:
        """Let go of the files."""
        self._map.close()
        os.close(self._data)

    def _runs_between(self, begin: int, end: int) -> Iterator[tuple[bool, int, int]]:
        """Yield (whether this layer has it, begin, end) for a range that lies within the size."""
        if begin < end:
            for run in _RUNS.finditer(self._map, begin // CHUNK_BYTES, _chunks(end)):
                first, last = max(run.start() * CHUNK_BYTES, begin), min(run.end() * CHUNK_BYTES, end)
                yield run[0][:1] == _PRESENT, first, last

    def _missing(self, chunk: int, begin: int, end: int) -> bytes:
        """What must be written beside a part of a chunk so that the chunk is whole."""
        return b"" if begin >= end or self._map[chunk] else self.read(begin, end - begin)

    def _cut_off(self, size_bytes: int) -> None:
        whole = size_bytes // CHUNK_BYTES
        if size_bytes % CHUNK_BYTES:
            kept = self.read(whole * CHUNK_BYTES, size_bytes % CHUNK_BYTES)
            self.write(whole * CHUNK_BYTES, kept.ljust(min(CHUNK_BYTES, self.size_bytes - whole * CHUNK_BYTES), b"\0"))
        self.shown = min(self.shown, size_bytes)


@dataclass(frozen=True)
class Unsynced:
    """A layer with writes that are not on the disk yet, and descriptors of its own for its files."""

    layer: Layer
    writes: int
    data: int
    map_file: int

    def sync(self) -> None:
        """Put them there. Raises OSError."""
        try:
            os.fdatasync(self.data)
            os.fdatasync(self.map_file)
        finally:
            os.close(self.data)
            os.close(self.map_file)
        self.layer.synced(self.writes)


class LayerStore:
    """The layers of a cluster, each in a directory of its own below one directory."""

    def __init__(self, directory: Path) -> None:
        """Take the directory, made when missing."""
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.open: dict[str, Layer] = {}

    def add(self, name: str, parent: Layer | None, size_bytes: int, shown: int | None = None) -> Layer:
        """Open a layer, or make an empty one."""
        shown = (parent.size_bytes if parent else 0) if shown is None else shown
        layer = Layer(self.directory / name, parent, size_bytes, min(shown, size_bytes))
        self.open[name] = layer
        return layer

    def remove(self, layer: Layer) -> None:
        """Delete a layer upon which no other is."""
        self.open.pop(layer.name, None)
        layer.close()
        shutil.rmtree(layer.directory)

    def used_bytes(self) -> int:
        """How much all layers have."""
        return CHUNK_BYTES * sum(layer.own_chunks for layer in self.open.values())

    def forget_strangers(self) -> None:
        """Delete what was made and never recorded before a crash."""
        for found in self.directory.iterdir():
            if found.name not in self.open:
                shutil.rmtree(found)

    def close(self) -> None:
        """Close every layer."""
        for layer in self.open.values():
            layer.close()
        self.open.clear()


def _chunks(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES)


def _read_exactly(descriptor: int, part: memoryview, offset: int) -> None:
    done = 0
    while done < len(part):
        read = os.preadv(descriptor, [part[done:]], offset + done)
        if read == 0:
            raise OSError(f"a layer ends at {offset + done}")
        done += read
