"""What changed between two snapshots: applied to the older one it gives the newer one."""

import itertools

import pytest

from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.conformance.conftest import COMPARING, Bench, refused
from tests.conformance.storages import MIB

Extents = list[tuple[int, int]]


def changed(bench: Bench, group: str, volume: str, base: str = "", *, coarse: bool = False) -> Extents:
    request = rpc.ListChangedExtentsRequest(id=group, volume=bench.ref(volume), base_id=base, coarse=coarse)
    responses = bench.stub.ListChangedExtents(request, timeout=60)
    return [(extent.offset, extent.length) for response in responses for extent in response.extents]


def applied(bench: Bench, base: bytes, group: str, volume: str, extents: Extents) -> bytes:
    content = bytearray(base)
    size = bench.get(group).members[0].size_bytes
    content[size:] = bytes(max(0, size - len(content)))
    for offset, length in extents:
        assert offset + length <= size
        content[offset : offset + length] = bench.read(group, volume, offset, length)
    return bytes(content)


def test_a_pool_that_cannot_compare_says_so(bench: Bench) -> None:
    volume, group = bench.volume(), bench.id()
    bench.take(group, volume)
    assert bench.capabilities().changed_extents == bench.storage.compares
    if not bench.storage.compares:
        with refused("CAPABILITY_MISSING"):
            changed(bench, group, volume)


@COMPARING
@pytest.mark.parametrize("coarse", [False, True])
def test_the_changes_make_the_newer_of_the_older(bench: Bench, coarse: bool) -> None:
    volume, old, new = bench.volume(64 * MIB), bench.id(), bench.id()
    for offset in (0, 20, 40):
        bench.storage.write(volume, offset * MIB, b"before" * 100_000)
    bench.take(old, volume)
    bench.storage.write(volume, 8 * MIB + 777, b"new")
    bench.storage.write(volume, 20 * MIB, bytes(MIB))
    bench.storage.write(volume, 41 * MIB - 5, b"straddles")
    bench.take(new, volume)
    bench.storage.write(volume, 60 * MIB, b"after the newer one")
    extents = changed(bench, new, volume, old, coarse=coarse)
    then = bench.read(new, volume)
    assert applied(bench, bench.read(old, volume), new, volume, extents) == then
    assert extents == sorted(extents)
    assert all(offset + length <= following for (offset, length), (following, _) in itertools.pairwise(extents))
    assert sum(length for _, length in extents) <= (16 if coarse else 2) * MIB


@COMPARING
def test_nothing_changed_is_nothing(bench: Bench) -> None:
    volume, old, new = bench.volume(), bench.id(), bench.id()
    bench.take(old, volume)
    bench.take(new, volume)
    assert changed(bench, new, volume, old) == []


@COMPARING
def test_the_same_bytes_written_again_are_no_exact_change(bench: Bench) -> None:
    volume, old, new = bench.volume(), bench.id(), bench.id()
    bench.take(old, volume)
    bench.storage.write(volume, 0, b"x")
    bench.take(new, volume)
    assert sum(length for _, length in changed(bench, new, volume, old)) <= MIB


@COMPARING
def test_from_nothing_is_what_is_allocated(bench: Bench) -> None:
    volume, group = bench.volume(32 * MIB), bench.id()
    bench.storage.write(volume, 17 * MIB, b"island")
    bench.take(group, volume)
    extents = changed(bench, group, volume)
    assert applied(bench, bytes(32 * MIB), group, volume, extents) == bench.read(group, volume)
    assert extents == bench.storage.member_ranges(group, volume)


@COMPARING
def test_backwards_is_what_a_revert_would_write(bench: Bench) -> None:
    volume, old, new = bench.volume(16 * MIB), bench.id(), bench.id()
    bench.take(old, volume)
    bench.storage.write(volume, 5 * MIB, b"newer")
    bench.take(new, volume)
    extents = changed(bench, old, volume, new)
    assert applied(bench, bench.read(new, volume), old, volume, extents) == bench.read(old, volume)
    assert 0 < sum(length for _, length in extents) <= 4 * MIB


@COMPARING
def test_a_volume_that_grew_and_one_that_shrank(bench: Bench) -> None:
    volume, small, large, again = bench.volume(8 * MIB), bench.id(), bench.id(), bench.id()
    bench.storage.write(volume, 7 * MIB, b"end")
    bench.take(small, volume)
    bench.storage.resize(volume, 16 * MIB)
    bench.storage.write(volume, 15 * MIB, b"grown")
    bench.take(large, volume)
    bench.storage.resize(volume, 6 * MIB)
    bench.take(again, volume)
    for base, group in ((small, large), (large, again), (again, large)):
        extents = changed(bench, group, volume, base)
        size = bench.get(group).members[0].size_bytes
        result = applied(bench, bench.read(base, volume), group, volume, extents)[:size]
        assert result == bench.read(group, volume)


@COMPARING
def test_the_base_has_to_have_the_volume(bench: Bench) -> None:
    volume, other, group, base = bench.volume(), bench.volume(), bench.id(), bench.id()
    bench.take(group, volume)
    bench.take(base, other)
    with refused("MEMBER_NOT_FOUND"):
        changed(bench, group, volume, base)
    with refused("GROUP_SNAPSHOT_NOT_FOUND"):
        changed(bench, group, volume, "never-was")
