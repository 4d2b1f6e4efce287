"""The simulator's copy-on-write layers against plain bytes: whatever is done, every snapshot stays what it was."""

import resource
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from frostgate_storpool_sim.layers import Layer, LayerStore

MOST = 20 * 1024
sizes = st.integers(1, MOST // 512).map(lambda sectors: sectors * 512)


class Layers(RuleBasedStateMachine):
    """A volume, its snapshots, and what they have to be."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="frostgate-layers-"))
        self.store = LayerStore(self.directory / "layers")
        self.snapshots: list[tuple[Layer, bytes]] = []
        self.made = 0

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)

    @initialize(size=sizes)
    def begin(self, size: int) -> None:
        self.volume = self.add(None, size)
        self.expected = bytearray(size)

    def add(self, parent: Layer | None, size: int) -> Layer:
        self.made += 1
        return self.store.add(f"{self.made:08d}", parent, size)

    @rule(offset=st.integers(0, MOST), length=st.integers(1, 9000), byte=st.integers(0, 255))
    def write(self, offset: int, length: int, byte: int) -> None:
        offset %= len(self.expected)
        content = bytes([byte]) * min(length, len(self.expected) - offset)
        self.volume.write(offset, content)
        self.expected[offset : offset + len(content)] = content

    @rule()
    def snapshot(self) -> None:
        self.snapshots.append((self.volume, bytes(self.expected)))
        self.volume = self.add(self.volume, len(self.expected))

    @rule(size=sizes)
    def resize(self, size: int) -> None:
        self.volume.resize(size)
        del self.expected[size:]
        self.expected += bytes(size - len(self.expected))

    @rule(small=sizes, big=sizes)
    def shrink_and_grow(self, small: int, big: int) -> None:
        self.resize(min(small, len(self.expected)))
        self.resize(big)

    @precondition(lambda self: self.snapshots)
    @rule(number=st.integers(0, 99), size=sizes)
    def revert(self, number: int, size: int) -> None:
        """To a snapshot, at its size or a bigger one, as a volume made upon it."""
        layer, content = self.snapshots[number % len(self.snapshots)]
        size = max(size, len(content))
        old, self.volume = self.volume, self.add(layer, size)
        self.store.remove(old)
        self.expected = bytearray(content.ljust(size, b"\0"))

    @precondition(lambda self: self.volume.parent is not None)
    @rule()
    def delete_parent(self) -> None:
        """The volume takes over what it shows of the layer below, which goes when nothing else is upon it."""
        below = self.volume.parent
        assert below
        for first, count in list(below.runs()):
            self.volume.take_over(first, count)
        self.volume.skip_parent()
        self.snapshots = [kept for kept in self.snapshots if kept[0] is not below]
        if not any(layer.parent is below for layer in self.store.open.values()):
            self.store.remove(below)

    @rule()
    def open_again(self) -> None:
        """As after kill -9."""
        facts = [(layer.name, layer.parent, layer.size_bytes, layer.shown) for layer in self.store.open.values()]
        again = LayerStore(self.store.directory)
        for name, parent, size, shown in facts:
            again.add(name, again.open[parent.name] if parent else None, size, shown)
        again.forget_strangers()
        self.volume = again.open[self.volume.name]
        self.snapshots = [(again.open[layer.name], content) for layer, content in self.snapshots]
        self.store.close()
        self.store = again

    @invariant()
    def everything_reads_as_expected(self) -> None:
        if self.made:
            assert self.volume.read(0, MOST) == bytes(self.expected).ljust(MOST, b"\0")
            for layer, content in self.snapshots:
                assert layer.read(0, len(content)) == content

    @invariant()
    def what_is_counted_is_there(self) -> None:
        for layer in self.store.open.values():
            assert layer.own_chunks == sum(count for _, count in layer.runs())
            assert layer.own_chunks * 4096 <= layer.seen_bytes()


Layers.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestLayers = Layers.TestCase


def test_what_a_volume_was_cut_off_does_not_come_back_when_layers_merge(tmp_path: Path) -> None:
    store = LayerStore(tmp_path / "layers")
    old = store.add("old", None, 16384)
    old.write(0, b"x" * 16384)
    middle = store.add("middle", old, 16384)
    middle.resize(5000 // 512 * 512)
    middle.resize(16384)
    volume = store.add("volume", middle, 16384)
    expected = (b"x" * (5000 // 512 * 512)).ljust(16384, b"\0")
    assert volume.read(0, 16384) == expected
    for first, count in list(middle.runs()):
        volume.take_over(first, count)
    volume.skip_parent()
    assert volume.read(0, 16384) == expected
    store.close()


def test_snapshots_may_be_thousands(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    store = LayerStore(tmp_path / "layers")
    try:
        layer = None
        for number in range(1200):
            layer = store.add(f"{number}", layer, 8192)
            if number == 0:
                layer.write(100, b"oldest")
        assert layer
        assert layer.read(0, 8192) == (bytes(100) + b"oldest").ljust(8192, b"\0")
        assert layer.seen_bytes() == 4096
        for unsynced in layer.unsynced():
            unsynced.sync()
        assert layer.unsynced() == []
    finally:
        store.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
