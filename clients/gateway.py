"""A connection to the gateway: the contract's calls with deadlines, and its errors with their reasons."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from frostgate.v1 import group_snapshot_pb2 as pb
from frostgate.v1 import snapshot_provider_pb2 as rpc
from frostgate.v1.snapshot_provider_pb2_grpc import SnapshotProviderStub

DEFAULT_ADDRESS = "unix:/run/frostgate/frostgate.sock"
CALL_TIMEOUT_S = 60.0
_MAX_MESSAGE_BYTES = 8 * 1024 * 1024


class GatewayError(Exception):
    """What the gateway answered other than success, or that it did not answer.

    `reason` is the contract's stable reason, or GATEWAY_UNAVAILABLE; `metadata` has the offending names;
    `violations` are pairs of a field and what is wrong with it.
    """

    def __init__(self, status: grpc.StatusCode, reason: str, message: str) -> None:
        """Take status, reason and words; the rest is set by from_rpc_error()."""
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.metadata: dict[str, str] = {}
        self.violations: list[tuple[str, str]] = []
        self.retry_after_s: float | None = None


@dataclass(frozen=True)
class Endpoint:
    """Where the gateway is and how to prove who we are.

    `address` is "unix:/path" or "host:port". With `ca` or `cert`, TLS; `token` is sent as a bearer token.
    """

    address: str = DEFAULT_ADDRESS
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token: str | None = field(default=None, repr=False)

    def channel(self) -> grpc.Channel:
        """Return a new channel. Raises OSError when a certificate cannot be read."""
        options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES), ("grpc.enable_http_proxy", 0)]
        if self.ca is None and self.cert is None:
            return grpc.insecure_channel(self.address, options)
        credentials = grpc.ssl_channel_credentials(
            self.ca.read_bytes() if self.ca else None,
            self.key.read_bytes() if self.key else None,
            self.cert.read_bytes() if self.cert else None,
        )
        return grpc.secure_channel(self.address, credentials, options)


class Gateway:
    """An open connection. Thread-safe; use it in a `with` block."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Take where to connect; the connection is made by the first call."""
        self.endpoint = endpoint
        self.channel = endpoint.channel()
        self._stub = SnapshotProviderStub(self.channel)
        self._metadata = (("authorization", f"Bearer {endpoint.token}"),) if endpoint.token else ()

    def call(self, method: str, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call one of the contract's unary methods by name. Raises GatewayError."""
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.endpoint) from None

    def stream(self, method: str, request: Any) -> Iterator[Any]:
        """Call one of the contract's streaming methods by name; ends with the generator. Raises GatewayError."""
        responses = getattr(self._stub, method)(request, metadata=self._metadata)
        try:
            yield from responses
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.endpoint) from None
        finally:
            responses.cancel()

    def get(self, group_id: str) -> pb.GroupSnapshot:
        """Return one group snapshot. Raises GatewayError."""
        found: pb.GroupSnapshot = self.call("GetGroupSnapshot", rpc.GetGroupSnapshotRequest(id=group_id)).group_snapshot
        return found

    def watch(self, group_id: str) -> Iterator[pb.GroupSnapshot]:
        """Yield every change of a group snapshot until it is READY, FAILED or gone. Raises GatewayError."""
        for response in self.stream("WatchGroupSnapshot", rpc.WatchGroupSnapshotRequest(id=group_id)):
            yield response.group_snapshot

    def list(self, **conditions: Any) -> Iterator[pb.GroupSnapshot]:
        """Yield all group snapshots that meet the conditions of ListGroupSnapshotsRequest, newest first."""
        request = rpc.ListGroupSnapshotsRequest(page_size=500, **conditions)
        while True:
            page = self.call("ListGroupSnapshots", request)
            yield from page.group_snapshots
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def delete(self, group_id: str, *, wait: bool = True) -> bool:
        """Delete a group snapshot, and wait until nothing of it is left; False when there was none. Repeatable.

        Raises GatewayError.
        """
        if not self.call("DeleteGroupSnapshot", rpc.DeleteGroupSnapshotRequest(id=group_id)).HasField("group_snapshot"):
            return False
        if wait:
            try:
                for _ in self.watch(group_id):
                    pass
            except GatewayError as error:
                if error.reason != "GROUP_SNAPSHOT_NOT_FOUND":
                    raise
        return True

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()

    def __enter__(self) -> Self:
        """Enter: the connection itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Exit: close()."""
        self.close()


def from_rpc_error(error: Any, endpoint: Endpoint) -> GatewayError:
    """Return a gRPC error with what its details tell."""
    status = rpc_status.from_call(error)
    code: grpc.StatusCode = error.code()
    if status is None or not status.details:
        return _without_details(code, error.details() or "", endpoint)
    result = GatewayError(code, "", status.message)
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            result.reason = info.reason
            result.metadata = dict(info.metadata)
        elif detail.Unpack(bad):
            result.violations = [(violation.field, violation.description) for violation in bad.field_violations]
        elif detail.Unpack(retry):
            result.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return result


def _without_details(code: grpc.StatusCode, details: str, endpoint: Endpoint) -> GatewayError:
    if code is not grpc.StatusCode.UNAVAILABLE:
        return GatewayError(code, code.name, details or code.name)
    why = details
    if endpoint.address.startswith("unix:"):
        path = Path(endpoint.address.removeprefix("unix:"))
        with suppress(OSError):
            if path.exists() and not os.access(path, os.R_OK | os.W_OK):
                why = f"no permission to open {path}"
    return GatewayError(
        code,
        "GATEWAY_UNAVAILABLE",
        f"no gateway answers at {endpoint.address} ({why}): start it with `frostgate serve`, "
        "or name another one with --address or FROSTGATE_ADDRESS",
    )
