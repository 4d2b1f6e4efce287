"""Rows of extents against sets of bytes."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from providers.base import Extent
from providers.extents import clipped, merged

rows = st.lists(st.builds(Extent, st.integers(0, 60), st.integers(1, 20)), max_size=12)


def covered(row: list[Extent]) -> set[int]:
    return {byte for extent in row for byte in range(extent.offset, extent.offset + extent.length)}


@given(rows)
def test_merged_extents_are_apart_and_cover_the_same(row: list[Extent]) -> None:
    row.sort(key=lambda extent: extent.offset)
    found = list(merged(row))
    assert covered(found) == covered(row)
    assert all(one.offset + one.length < other.offset for one, other in itertools.pairwise(found))


@given(rows)
def test_merging_loses_nothing_of_a_row_that_is_not_ascending(row: list[Extent]) -> None:
    assert covered(list(merged(row))) == covered(row)


@given(rows, st.integers(0, 90))
def test_clipped_extents_end_where_the_volume_ends(row: list[Extent], size: int) -> None:
    found = list(clipped(row, size))
    assert covered(found) == {byte for byte in covered(row) if byte < size}
    assert all(extent.length > 0 for extent in found)
