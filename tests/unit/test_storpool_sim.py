"""The StorPool simulator through StorPool's own bindings, which check every request and answer."""

from collections.abc import Iterator

import pytest
from storpool import spapi

from tests.lab import state
from tests.lab.storpool import StorpoolSim

MIB = 1 << 20


@pytest.fixture(scope="module")
def sim() -> Iterator[StorpoolSim]:
    with StorpoolSim("storpool-unit") as made:
        yield made
    state.release()


def test_a_group_snapshot_keeps_the_bytes_and_a_revert_brings_them_back(sim: StorpoolSim) -> None:
    api = sim.api()
    first, second = sim.create("first", 8 * MIB), sim.create("second", 8 * MIB)
    first.write_bytes(b"one" * 1000)
    second.write_bytes(b"two" * 1000)
    made = api.snapshotCreateGroup({"volumes": [{"volume": "first"}, {"volume": "second"}]}).snapshots
    first.write_bytes(b"bad" * 1000)
    second.write_bytes(b"bad" * 1000)
    for volume in ("first", "second"):
        with pytest.raises(spapi.ApiError) as refused:
            api.volumeRevert(volume, {"toSnapshot": f"~{made[0].snapshotGlobalId}"})
        assert refused.value.name == "busy"
        assert "client 1" in refused.value.desc
        sim.detach(volume)
    for volume, snapshot in zip(("first", "second"), made, strict=True):
        api.volumeRevert(volume, {"toSnapshot": f"~{snapshot.snapshotGlobalId}"})
        sim.attach(volume)
    assert first.read_bytes() == (b"one" * 1000).ljust(8 * MIB, b"\0")
    assert second.read_bytes() == (b"two" * 1000).ljust(8 * MIB, b"\0")
