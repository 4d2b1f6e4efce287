"""Members as NBD exports, by clients that are not ours (qemu-img, nbdinfo, libnbd), and by ours."""

import errno
import hashlib
import json
import os
import random
import socket
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import nbd
import pytest

from clients import patience
from clients.blocks import Blocks, open_blocks
from clients.gateway import Endpoint, Gateway
from clients.nbd_blocks import NbdBlocks
from clients.page_cache import PageCache
from clients.remote_blocks import RemoteBlocks
from frostgate.v1 import group_snapshot_pb2 as pb
from tests.conformance.conftest import FILES, Bench
from tests.conformance.storages import MIB, Storage
from tests.gateway_process import GatewayProcess
from tests.lab.disk import convert, sha256

SPARSE = 48 * MIB

ONE = pytest.mark.parametrize("storage", ["nfs-xfs"], indirect=True)
"""For what does not depend on the storage."""

TWO = pytest.mark.parametrize("storage", ["ceph-group", "nfs-xfs"], indirect=True)

AWAY = pytest.mark.parametrize("storage", ["ceph-group"], indirect=True)
"""For storages whose open snapshots can be out of reach."""


def member(bench: Bench) -> tuple[str, str, pb.Member]:
    """A sparse member, its group and volume."""
    volume, group = bench.volume(SPARSE), bench.id()
    for offset in (9, 30):
        bench.storage.write(volume, offset * MIB, os.urandom(3 * MIB))
    return group, volume, bench.take(group, volume).members[0]


def connected(uri: str) -> nbd.NBD:
    client = nbd.NBD()
    client.set_strict_mode(0)  # so that what the server must refuse is sent
    client.connect_uri(uri)
    return client


def refusal(call, *arguments) -> int:  # type: ignore[no-untyped-def]
    """The errno with which libnbd's call fails."""
    with pytest.raises(nbd.Error) as caught:
        call(*arguments)
    return int(caught.value.errnum)


def read_by_chance(blocks: Blocks, content: bytes, seed: int) -> None:
    """Runs in order from random places, of odd lengths."""
    chance = random.Random(seed)
    for _ in range(6):
        offset = chance.randrange(len(content))
        for _ in range(12):
            length = chance.choice([1, 4096, 100_000, 131_072, 2_500_000])
            assert blocks.read(offset, length) == content[offset : offset + length]
            offset += length


def test_an_export_has_the_bytes_of_its_member(bench: Bench, tmp_path: Path) -> None:
    group, volume, shown = member(bench)
    bench.storage.write(volume, 9 * MIB, b"later")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", shown.nbd_uri, tmp_path / "copy"], check=True)
    assert sha256(tmp_path / "copy") == bench.storage.member_digest(group, volume)


def test_the_map_of_an_export_is_what_is_allocated(bench: Bench) -> None:
    group, volume, shown = member(bench)
    told = subprocess.run(["nbdinfo", "--map", "--json", shown.nbd_uri], capture_output=True, check=True)
    ranges = [(one["offset"], one["length"]) for one in json.loads(told.stdout) if one["type"] == 0]
    assert ranges == bench.storage.member_ranges(group, volume)


@FILES
def test_an_export_of_a_qcow2_member_is_raw(bench: Bench, tmp_path: Path) -> None:
    volume, group = bench.volume(64 * MIB, image_format="qcow2"), bench.id()
    path = bench.storage.source(volume)["file"]
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 65 3M 2M", path], check=True, stdout=subprocess.DEVNULL)
    convert(Path(path), "qcow2", tmp_path / "oracle.raw", "raw")
    uri = bench.take(group, volume).members[0].nbd_uri
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", uri, tmp_path / "oracle.raw"], check=True)


def test_every_readable_member_is_listed_and_nothing_else(bench: Bench) -> None:
    group, volume, shown = member(bench)
    waiting = bench.id("prepared")
    bench.prepare(waiting, volume)
    path = parse_qs(urlsplit(shown.nbd_uri).query)["socket"][0]
    told = subprocess.run(["nbdinfo", "--list", f"nbd+unix:///?socket={path}"], capture_output=True, check=True)
    names = told.stdout.decode().splitlines()
    assert f'export="{group}/main/{volume}":' in names
    assert not [name for name in names if waiting in name]
    assert not bench.get(waiting).members[0].nbd_uri
    for unknown in (f"{waiting}/main/{volume}", f"{group}/main/none", f"{group}/none/{volume}", "", "a/b", "x" * 4000):
        asked = subprocess.run(["nbdinfo", f"nbd+unix:///{unknown}?socket={path}"], capture_output=True, check=False)
        assert asked.returncode == 1, unknown


def test_bad_requests_are_refused_and_the_connection_goes_on(bench: Bench) -> None:
    group, volume, shown = member(bench)
    client = connected(shown.nbd_uri)
    assert client.is_read_only()
    assert refusal(client.pread, 2, SPARSE - 1) == errno.EINVAL
    assert refusal(client.pread, 1, 1 << 62) == errno.EINVAL
    assert refusal(client.pread, 33 * MIB, 0) == errno.EINVAL
    assert refusal(client.pwrite, b"x" * 100_000, 0) == errno.EPERM
    assert refusal(client.zero, 4096, 0) == errno.EPERM
    assert refusal(client.trim, 4096, 0) == errno.EPERM
    assert refusal(client.flush) == errno.EINVAL
    assert refusal(client.cache, 4096, 0) == errno.EINVAL
    content = bytes(client.pread(SPARSE // 2, 0)) + bytes(client.pread(SPARSE // 2, SPARSE // 2))
    assert hashlib.sha256(content).hexdigest() == bench.storage.member_digest(group, volume)
    client.shutdown()


def test_old_clients_without_structured_replies_read_too(bench: Bench) -> None:
    _, volume, shown = member(bench)
    client = nbd.NBD()
    client.set_request_structured_replies(False)
    client.connect_uri(shown.nbd_uri)
    assert bytes(client.pread(20, 0)) == (f"{volume} as it was".encode() * 2)[:20]
    assert refusal(client.pread, 2, SPARSE - 1) == errno.EINVAL
    assert len(client.pread(4 * MIB, 8 * MIB)) == 4 * MIB
    client.shutdown()


def test_deleting_a_snapshot_ends_who_reads_it(bench: Bench) -> None:
    group, _, shown = member(bench)
    client = connected(shown.nbd_uri)
    assert len(client.pread(4096, 0)) == 4096
    bench.delete(group)
    refusal(client.pread, 4096, 0)
    assert client.aio_is_dead() or client.aio_is_closed()
    asked = subprocess.run(["nbdinfo", shown.nbd_uri], capture_output=True, check=False)
    assert asked.returncode == 1


def test_a_client_that_speaks_nonsense_or_nothing_harms_nobody(bench: Bench) -> None:
    _, _, shown = member(bench)
    path = parse_qs(urlsplit(shown.nbd_uri).query)["socket"][0]
    for said in (
        b"",
        b"\0" * 4,
        b"\0\0\0\3" + b"x" * 1000,
        b"\0\0\0\3IHAVEOPT\0\0\0\7\xff\xff\xff\xff",
        b"GET / HTTP/1.1",
    ):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(path)
            raw.sendall(said)
    assert len(connected(shown.nbd_uri).pread(4096, 0)) == 4096


def test_our_client_reads_the_same_at_random_in_order_and_at_once(bench: Bench) -> None:
    group, volume, _ = member(bench)
    content = bench.read(group, volume)
    with Gateway(Endpoint(bench.gateway.address)) as gateway:
        taken = gateway.get(group)
        shown = taken.members[0]
        shown.local_path = ""
        blocks = open_blocks(gateway, taken, shown, PageCache(8 * MIB))
        assert isinstance(blocks, NbdBlocks)
        assert b"".join(blocks.read(at, 131_072) for at in range(0, SPARSE, 131_072)) == content
        with ThreadPoolExecutor(20) as threads:
            list(threads.map(lambda seed: read_by_chance(blocks, content, seed), range(20)))
        asked = [blocks.begin(at, 4096) for at in (31 * MIB, 5 * MIB)]
        for at, one in zip((31 * MIB, 5 * MIB), asked, strict=True):
            assert one is None or one.finish() == content[at : at + 4096]
        assert blocks.allocated_bytes() == sum(size for _, size in bench.storage.member_ranges(group, volume))
        blocks.close()
        bench.delete(group)


@TWO
def test_our_client_waits_for_a_gateway_that_restarts_and_not_for_ever(
    own: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, volume, _ = member(own)
    content = own.read(group, volume)
    with Gateway(Endpoint(own.gateway.address)) as gateway:
        taken = gateway.get(group)
        taken.members[0].local_path = ""
        blocks = open_blocks(gateway, taken, taken.members[0], PageCache())
        assert blocks.read(0, 5000) == content[:5000]
        own.gateway.kill()
        starting = threading.Timer(1, own.gateway.start)
        starting.start()
        assert blocks.read(9 * MIB, 1000) == content[9 * MIB : 9 * MIB + 1000]
        starting.join()
        for at in range(0, 8 * MIB, MIB // 2):
            assert blocks.read(at, MIB // 2) == content[at : at + MIB // 2]
        monkeypatch.setattr(patience, "GIVE_UP_S", 0.5)
        own.gateway.stop()
        with pytest.raises(OSError, check=lambda error: error.errno == errno.EIO):
            blocks.read(30 * MIB, 4096)
        own.gateway.start()
        assert blocks.read(30 * MIB, 4096) == content[30 * MIB : 30 * MIB + 4096]
        own.delete(group)
        with pytest.raises(OSError, check=lambda error: error.errno == errno.EIO):
            blocks.read(31 * MIB, 4096)
        blocks.close()


@AWAY
def test_a_storage_that_is_away_is_an_error_and_comes_back(own: Bench) -> None:
    volume, group = own.volume(pool="other"), own.id()
    client = connected(own.take(group, ("other", volume)).members[0].nbd_uri)
    before = bytes(client.pread(4096, 0))
    with own.storage.away():
        assert refusal(client.pread, 4096, 8192) == errno.EIO
    deadline = time.monotonic() + 60
    while True:
        try:
            assert bytes(client.pread(4096, 0)) == before
            break
        except nbd.Error:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@ONE
def test_the_number_of_connections_is_bounded(storage: Storage, tmp_path: Path) -> None:
    with GatewayProcess(tmp_path / "own", storage.pools(), nbd_connections=2) as running:
        bench = Bench(storage, running)
        _, _, shown = member(bench)
        clients = [connected(shown.nbd_uri) for _ in range(2)]
        with pytest.raises(nbd.Error):
            connected(shown.nbd_uri)
        assert all(len(client.pread(10, 0)) == 10 for client in clients)
        clients.pop().shutdown()
        deadline = time.monotonic() + 30
        while len(clients) < 2:
            try:
                clients.append(connected(shown.nbd_uri))
            except nbd.Error:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        bench.clean()


@ONE
def test_exports_are_for_whoever_may_open_the_gateways_socket(storage: Storage, tmp_path: Path) -> None:
    process = GatewayProcess(tmp_path / "own", storage.pools())
    lines = process.config.read_text().splitlines()
    lines[1] = lines[1].replace("]", ', "127.0.0.1:0"]')
    lines[2:2] = ['socket_mode = "0660"', 'socket_group = "daemon"', "insecure_tcp = true"]
    process.config.write_text("\n".join(lines))
    with process:
        bench = Bench(storage, process)
        group, _, shown = member(bench)
        beside = Path(parse_qs(urlsplit(shown.nbd_uri).query)["socket"][0]).stat()
        own = Path(process.address.removeprefix("unix:")).stat()
        assert stat.S_IMODE(beside.st_mode) == stat.S_IMODE(own.st_mode) == 0o660
        assert (beside.st_uid, beside.st_gid) == (own.st_uid, own.st_gid)
        port = next(line["address"] for line in process.log() if line["event"] == "listening")
        with Gateway(Endpoint(port)) as gateway:
            far = gateway.get(group)
            assert not far.members[0].nbd_uri
            blocks = open_blocks(gateway, far, far.members[0], PageCache())
            assert isinstance(blocks, RemoteBlocks)
            assert blocks.read(30 * MIB, 4096) == bench.read(group, shown.volume.volume, 30 * MIB, 4096)
            blocks.close()
        bench.clean()
