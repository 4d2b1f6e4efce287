"""Two gateways, each with a journal of its own, on one pool: they never work on the same thing at once."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from frostgate.v1 import volume_pb2
from providers.base import GroupBusy, GroupSpec, ProviderError, SnapshotExists, VolumeInUse, VolumeSpec
from providers.nfs import locks
from providers.nfs.options import NfsOptions
from providers.nfs.provider import NfsProvider
from tests.conformance.conftest import refused
from tests.gateway_process import GatewayProcess
from tests.lab import state
from tests.lab.disk import sha256
from tests.lab.filesystems import mount_filesystem

MIB = 1 << 20
NOW = datetime(2026, 1, 1, tzinfo=UTC)
READY = pb.GROUP_SNAPSHOT_STATE_READY


@pytest.fixture(scope="module")
def filesystem() -> Iterator[Path]:
    with mount_filesystem("xfs", state.prepare() / "shared", 320 * MIB) as mounted:
        yield mounted.directory
    state.release()


@pytest.fixture
def pool(filesystem: Path, request: pytest.FixtureRequest) -> Path:
    root = filesystem / request.node.name
    root.mkdir()
    for name in ("a.raw", "b.raw"):
        (root / name).write_bytes(name.encode() * MIB)
    return root


@dataclass(frozen=True)
class Shared:
    """Two gateways that run, and their pool."""

    one: GatewayProcess
    two: GatewayProcess
    pool: Path

    def volume(self, name: str) -> Path:
        path = self.pool / name
        path.write_bytes(name.encode() * MIB)
        return path

    def member(self, group: str, volume: str) -> Path:
        return self.pool / ".frostgate" / group / volume


@pytest.fixture(scope="module")
def shared(filesystem: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    root, files = filesystem / "shared", tmp_path_factory.mktemp("gateways")
    root.mkdir()
    table = {"fast": {"kind": "nfs", "root": str(root)}}
    with GatewayProcess(files / "one", table) as one, GatewayProcess(files / "two", table) as two:
        yield Shared(one, two, root)


@pytest.fixture
def providers(pool: Path) -> Iterator[tuple[NfsProvider, NfsProvider]]:
    one, two = (NfsProvider(name, NfsOptions(root=pool)) for name in ("one", "two"))
    yield one, two
    one.close()
    two.close()


def ref(volume: str) -> volume_pb2.VolumeRef:
    return volume_pb2.VolumeRef(pool="fast", volume=volume)


def prepare(gateway: GatewayProcess, group: str, *volumes: str) -> pb.GroupSnapshot:
    spec = pb.GroupSnapshotSpec(volumes=[pb.VolumeSpec(ref=ref(volume)) for volume in volumes])
    return gateway.stub.PrepareGroupSnapshot(rpc.PrepareGroupSnapshotRequest(id=group, spec=spec)).group_snapshot


def take(gateway: GatewayProcess, group: str, *volumes: str) -> pb.GroupSnapshot:
    prepare(gateway, group, *volumes)
    gateway.stub.CreateGroupSnapshot(rpc.CreateGroupSnapshotRequest(id=group), timeout=60)
    return settled(gateway, group)


def settled(gateway: GatewayProcess, group: str) -> pb.GroupSnapshot:
    return list(gateway.stub.WatchGroupSnapshot(rpc.WatchGroupSnapshotRequest(id=group), timeout=120))[
        -1
    ].group_snapshot


def spec(group: str, *volumes: str) -> GroupSpec:
    return GroupSpec(group, tuple(VolumeSpec(volume) for volume in volumes))


def make(provider: NfsProvider, group: str, *volumes: str) -> None:
    provider.prepare(spec(group, *volumes))
    provider.cut(group)
    provider.settle(group, NOW, b"record", ignored)


def ignored(_done: int, _total: int) -> None:
    pass


def test_an_id_that_the_other_gateway_is_making_is_refused_and_stays_whole(shared: Shared) -> None:
    mine, other = shared.volume("id-1.raw"), shared.volume("id-2.raw")
    before = sha256(mine)
    prepare(shared.one, "same", mine.name)
    with refused("OPERATION_PENDING") as error:
        prepare(shared.two, "same", other.name)
    assert "another gateway" in error.value.details()
    shared.one.stub.CreateGroupSnapshot(rpc.CreateGroupSnapshotRequest(id="same"), timeout=60)
    assert settled(shared.one, "same").state == READY
    mine.write_bytes(b"later" * MIB)
    assert sha256(shared.member("same", mine.name)) == before
    assert not shared.member("same", other.name).exists()


def test_a_revert_changes_nothing_of_what_the_other_gateway_is_about_to_cut(shared: Shared) -> None:
    volume = shared.volume("revert.raw")
    assert take(shared.two, "of-two", volume.name).state == READY
    volume.write_bytes(b"later" * MIB)
    later = sha256(volume)
    prepare(shared.one, "of-one", volume.name)
    revert = rpc.RevertGroupSnapshotRequest(id="of-two", no_safety=True)
    shared.two.stub.RevertGroupSnapshot(revert)
    outcome = settled(shared.two, "of-two").revert
    assert outcome.state == pb.Revert.STATE_FAILED
    assert outcome.failure.reason == "VOLUME_IN_USE"
    assert "another gateway" in outcome.failure.message
    assert sha256(volume) == later
    shared.one.stub.CreateGroupSnapshot(rpc.CreateGroupSnapshotRequest(id="of-one"), timeout=60)
    assert settled(shared.one, "of-one").state == READY
    shared.two.stub.RevertGroupSnapshot(revert)
    assert settled(shared.two, "of-two").revert.state == pb.Revert.STATE_DONE
    assert sha256(volume) == sha256(shared.member("of-two", volume.name)) != later
    assert sha256(shared.member("of-one", volume.name)) == later


def test_an_id_is_free_as_soon_as_the_gateway_that_was_making_it_is_killed(shared: Shared) -> None:
    first, second = shared.volume("free-1.raw"), shared.volume("free-2.raw")
    prepare(shared.one, "free", first.name, second.name)
    shared.one.kill()
    assert take(shared.two, "free", second.name).state == READY
    left = sorted(path.name for path in shared.member("free", "").iterdir())
    assert left == [".manifest.json", second.name]
    shared.one.start()  # undoes its reservation, of which nothing is left, and leaves the other's snapshot alone
    shared.two.stub.GetGroupSnapshot(rpc.GetGroupSnapshotRequest(id="free"))
    assert sha256(shared.member("free", second.name)) == sha256(second)


def test_reconcile_keeps_what_the_other_gateway_is_making_and_removes_what_nobody_is(shared: Shared) -> None:
    volume, left = shared.volume("made.raw"), shared.volume("left.raw")
    prepare(shared.one, "being-made", volume.name)
    prepare(shared.two, "left", left.name)
    shared.two.kill()
    assert shared.member("left", left.name).exists()
    shared.two.rebuild_journal()
    assert not shared.member("left", "").exists()
    shared.one.stub.CreateGroupSnapshot(rpc.CreateGroupSnapshotRequest(id="being-made"), timeout=60)
    assert settled(shared.one, "being-made").state == READY
    assert sha256(shared.member("being-made", volume.name)) == sha256(volume)


def test_every_verb_on_a_group_refuses_while_the_other_gateway_has_it(
    providers: tuple[NfsProvider, NfsProvider], pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE_S", 0.0)
    one, two = providers
    one.prepare(spec("g", "a.raw"))
    for verb in (
        lambda: two.prepare(spec("g", "a.raw")),
        lambda: two.abort("g"),
        lambda: two.delete("g", ignored),
    ):
        with pytest.raises(GroupBusy, match="another gateway"):
            verb()
    assert list(two.leftovers()) == []
    one.cut("g")
    with pytest.raises(GroupBusy):
        two.settle("g", NOW, b"", ignored)
    one.settle("g", NOW, b"record", ignored)
    with pytest.raises(SnapshotExists):
        two.prepare(spec("g", "a.raw"))
    one.prepare_revert("g", ["a.raw"], ignored)
    for verb in (
        lambda: two.describe("g", b"other"),
        lambda: two.delete("g", ignored),
        lambda: two.prepare_revert("g", ["a.raw"], ignored),
        lambda: two.revert("g", ["a.raw"], ignored),
        lambda: two.abort_revert("g"),
    ):
        with pytest.raises(GroupBusy, match="another gateway"):
            verb()
    with pytest.raises(VolumeInUse, match="another gateway"):
        two.prepare(spec("h", "b.raw", "a.raw"))
    assert [path.name for path in (pool / ".frostgate").iterdir() if path.is_dir()] == ["g"]
    one.describe("g", b"mine")  # its own
    one.prepare(spec("safety", "a.raw"))  # a safety snapshot, of what it is about to revert
    one.cut("safety")
    one.settle("safety", NOW, b"", ignored)
    one.revert("g", ["a.raw"], ignored)
    two.describe("g", b"other")
    assert {found.group: found.record for found in one.snapshots()} == {"g": b"other", "safety": b""}
    two.delete("g", ignored)
    two.delete("safety", ignored)
    assert [path.name for path in (pool / ".frostgate").iterdir()] == [".lock"]


def test_an_operator_who_removes_everything_does_not_let_them_in_together(
    providers: tuple[NfsProvider, NfsProvider], pool: Path
) -> None:
    one, two = providers
    make(one, "g", "a.raw")
    subprocess.run(["rm", "-r", pool / ".frostgate"], check=True)
    one.prepare(spec("g", "a.raw"))
    with pytest.raises(GroupBusy):
        two.prepare(spec("g", "a.raw"))


EXPECTED = ("OPERATION_PENDING", "VOLUME_IN_USE", "VOLUME_CHANGED", "GROUP_SNAPSHOT_EXISTS", "SNAPSHOT_DAMAGED")


def make_revert_delete(provider: NfsProvider, number: int) -> int:
    """Do that to the same groups and volumes as somebody else; returns how often it went well."""
    made = 0
    for turn in range(60):
        group, volume = f"g{turn % 3}", ("a.raw", "b.raw")[(turn + number) % 2]
        try:
            make(provider, group, "a.raw", "b.raw")
            provider.prepare_revert(group, [volume], ignored)
            provider.revert(group, [volume], ignored)
            made += 1
        except ProviderError as error:
            if error.reason not in EXPECTED:
                raise
        with suppress(GroupBusy):
            provider.delete(group, ignored)
    return made


def test_what_both_make_revert_and_delete_at_once_is_whole(
    providers: tuple[NfsProvider, NfsProvider], pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_PATIENCE_S", 0.01)
    whole = {name: sha256(pool / name) for name in ("a.raw", "b.raw")}
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(make_revert_delete, providers, (0, 1)))
    assert min(made) > 0
    assert {name: sha256(pool / name) for name in whole} == whole
    for group in providers[0].snapshots():
        for member in group.members:
            assert sha256(Path(member.local_path)) == whole[member.volume]
    for provider in providers:
        for group_id in [found.group for found in provider.snapshots()]:
            provider.delete(group_id, ignored)
        for group_id in list(provider.leftovers()):
            provider.abort(group_id)
    assert [path.name for path in (pool / ".frostgate").iterdir()] == [".lock"]
