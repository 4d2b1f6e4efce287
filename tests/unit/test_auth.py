"""Who may do what: over real TLS with certificates that openssl made, and with tokens."""

import hashlib
import socket
import subprocess
from pathlib import Path

import grpc
import pytest

from clients.gateway import Endpoint, Gateway, GatewayError
from frostgate.v1 import snapshot_provider_pb2 as rpc
from tests.gateway_process import FROSTGATE


def openssl(directory: Path, name: str, issuer: str = "") -> None:
    request = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key"] if issuer else []
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost"]
    command = [*request, "-x509", *signed, *subject, "-keyout", f"{name}.key", "-out", f"{name}.pem"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)


@pytest.fixture
def tls(tmp_path: Path):  # type: ignore[no-untyped-def]
    openssl(tmp_path, "ca")
    for name in ("server", "cloudstack", "stranger"):
        openssl(tmp_path, name, "ca")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "pool").mkdir()
    (tmp_path / "hidden").mkdir()
    token = hashlib.sha256(b"secret").hexdigest()
    (tmp_path / "f.toml").write_text(
        f"""
[gateway]
listen = ["127.0.0.1:{port}"]
journal = "{tmp_path}/journal.db"
[gateway.tls]
cert = "{tmp_path}/server.pem"
key = "{tmp_path}/server.key"
client_ca = "{tmp_path}/ca.pem"
[[clients]]
name = "cloudstack"
certificate = "cloudstack"
rights = ["read", "snapshot", "revert", "delete"]
pools = ["mine"]
[[clients]]
name = "backup"
token_sha256 = "{token}"
[pools.mine]
kind = "nfs"
root = "{tmp_path}/pool"
[pools.hidden]
kind = "nfs"
root = "{tmp_path}/hidden"
"""
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([FROSTGATE, "serve", "-c", tmp_path / "f.toml"], stderr=log)

    def connect(name: str, token: str | None = None) -> Gateway:
        endpoint = Endpoint(
            f"localhost:{port}", tmp_path / "ca.pem", tmp_path / f"{name}.pem", tmp_path / f"{name}.key", token
        )
        gateway = Gateway(endpoint)
        grpc.channel_ready_future(gateway.channel).result(timeout=20)
        return gateway

    yield connect
    process.terminate()
    assert process.wait(20) == 0
    assert b"secret" not in (tmp_path / "log").read_bytes()


def refused(gateway: Gateway, method: str, request: object) -> str:
    with pytest.raises(GatewayError) as caught:
        gateway.call(method, request)
    return caught.value.reason


def test_rights_and_pools_are_those_of_the_configuration(tls) -> None:  # type: ignore[no-untyped-def]
    with tls("cloudstack") as known:
        assert [pool.name for pool in known.call("ListPools", rpc.ListPoolsRequest()).pools] == ["mine"]
        assert refused(known, "ListVolumes", rpc.ListVolumesRequest(pool="hidden")) == "PERMISSION_DENIED"
        known.delete("missing")
    with tls("stranger") as stranger:
        assert refused(stranger, "ListPools", rpc.ListPoolsRequest()) == "UNAUTHENTICATED"
    with tls("stranger", "wrong") as wrong:
        assert refused(wrong, "ListPools", rpc.ListPoolsRequest()) == "UNAUTHENTICATED"
    with tls("stranger", "secret") as backup:
        assert len(backup.call("ListPools", rpc.ListPoolsRequest()).pools) == 2
        assert refused(backup, "DeleteGroupSnapshot", rpc.DeleteGroupSnapshotRequest(id="x")) == "PERMISSION_DENIED"
