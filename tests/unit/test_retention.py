"""What a retention policy keeps."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from clients.coordinator.retention import Policy, to_delete
from frostgate.v1 import group_snapshot_pb2 as pb

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


def taken(*hours: int) -> list[pb.GroupSnapshot]:
    found = []
    for hour in hours:
        snapshot = pb.GroupSnapshot(id=f"h{hour}", state=pb.GROUP_SNAPSHOT_STATE_READY)
        snapshot.cut_time.FromDatetime(START + timedelta(hours=hour))
        found.append(snapshot)
    return found


def deleted(hours: list[int], policy: Policy) -> list[str]:
    return [snapshot.id for snapshot in to_delete(taken(*hours), policy)]


def test_the_newest_are_kept() -> None:
    assert deleted([3, 1, 2, 4], Policy(last=2)) == ["h1", "h2"]


def test_the_newest_of_each_day_is_kept() -> None:
    assert deleted([0, 1, 24, 25, 48], Policy(daily=2)) == ["h0", "h1", "h24"]


def test_what_any_rule_keeps_is_kept() -> None:
    assert deleted([0, 24, 48, 49], Policy(last=1, daily=9)) == ["h48"]


def test_only_ready_snapshots_count() -> None:
    snapshots = taken(1, 2)
    snapshots[1].state = pb.GROUP_SNAPSHOT_STATE_COPYING
    assert to_delete(snapshots, Policy(last=1)) == []


@given(st.lists(st.integers(0, 5000), unique=True), st.integers(1, 5), st.integers(0, 5), st.integers(0, 5))
def test_the_newest_is_never_deleted(hours: list[int], last: int, daily: int, weekly: int) -> None:
    victims = deleted(hours, Policy(last=last, daily=daily, weekly=weekly))
    if hours:
        assert f"h{max(hours)}" not in victims
    assert len(hours) - len(victims) <= last + daily + weekly
