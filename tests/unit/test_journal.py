"""The journal: durable, one writer's failure is nobody else's, and the tree of a VM."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import volume_pb2
from gateway import states
from gateway.journal import Filter, Group, Journal, JournalError

UUID = "11111111-2222-3333-4444-555555555555"


def group(name: str, vm: str = "") -> Group:
    ref = volume_pb2.VolumeRef(pool="p", volume="v")
    snapshot = pb.GroupSnapshot(id=name, state=states.PREPARED, members=[pb.Member(volume=ref)], labels={"l": name})
    if vm:
        snapshot.vm.uuid = vm
    return Group(snapshot, pb.GroupSnapshotSpec(volumes=[pb.VolumeSpec(ref=ref)]))


def test_what_was_written_is_there_for_the_next(tmp_path: Path) -> None:
    async def work() -> None:
        journal = Journal(tmp_path / "j.db")
        assert await journal.insert(group("a"))
        assert not await journal.insert(group("a"))
        journal.close()
        again = Journal(tmp_path / "j.db")
        found = await again.get("a")
        assert found is not None
        assert found.snapshot == group("a").snapshot
        await again.remove("a")
        assert await again.all() == []
        again.close()

    asyncio.run(work())


def test_one_writer_s_failure_is_nobody_else_s(tmp_path: Path) -> None:
    async def work() -> None:
        journal = Journal(tmp_path / "j.db")

        def fail(_connection: object) -> None:
            raise RuntimeError("mine")

        results = await asyncio.gather(
            *(journal.insert(group(f"g{number}")) for number in range(20)),
            journal._write(fail),
            *(journal.insert(group(f"h{number}")) for number in range(20)),
            return_exceptions=True,
        )
        assert [result for result in results if result is not True] == [results[20]]
        assert str(results[20]) == "mine"
        assert len(await journal.all()) == 40
        journal.close()

    asyncio.run(work())


def test_a_newer_journal_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "j.db").close()
    with sqlite3.connect(tmp_path / "j.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalError, match="newer Frostgate"):
        Journal(tmp_path / "j.db")


def test_a_second_gateway_is_refused(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j.db")
    with pytest.raises(JournalError, match="another gateway"):
        Journal(tmp_path / "j.db")
    first.close()
    Journal(tmp_path / "j.db").close()


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(JournalError, match="cannot be opened"):
        Journal(tmp_path / "j.db")


def test_pages_are_newest_first_and_do_not_slide(tmp_path: Path) -> None:
    async def work() -> None:
        journal = Journal(tmp_path / "j.db")
        for number in range(5):
            await journal.insert(group(f"g{number}"))
        first = await journal.page(Filter(), None, 2)
        await journal.insert(group("new"))
        await journal.remove("g3")
        second = await journal.page(Filter(), first[-1].seq, 2)
        assert [found.id for found in first + second] == ["g4", "g3", "g2", "g1"]
        assert [found.id for found in await journal.page(Filter(labels={"l": "g1"}), None, 9)] == ["g1"]
        assert await journal.page(Filter(pools=frozenset({"other"})), None, 9) == []
        journal.close()

    asyncio.run(work())


def test_the_parent_of_a_deleted_snapshot_takes_its_place(tmp_path: Path) -> None:
    async def work() -> None:
        journal = Journal(tmp_path / "j.db")
        for name in ("a", "b", "c"):
            made = group(name, UUID)
            await journal.insert(made)
            await journal.save_cut(made)
        middle = await journal.get("b")
        assert middle is not None
        assert await journal.save_deleting(middle) == ["c"]
        await journal.remove("b")
        tree = {found.id: (found.snapshot.vm.parent_id, found.snapshot.vm.current) for found in await journal.all()}
        assert tree == {"a": ("", False), "c": ("a", True)}
        journal.close()

    asyncio.run(work())
