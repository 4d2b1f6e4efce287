"""Errors of the gateway and the one place where they become gRPC statuses.

Every status carries google.rpc.ErrorInfo (domain "frostgate", the contract's stable reason, the offending
names), BadRequest for bad input, and RetryInfo where trying again can help. Source: Google AIP-193.
"""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from frostgate.v1 import group_snapshot_pb2
from providers.base import ProviderError

DOMAIN = "frostgate"

_STATUS_OF_REASON: dict[str, int] = {
    "INVALID_ARGUMENT": code_pb2.INVALID_ARGUMENT,
    "UNAUTHENTICATED": code_pb2.UNAUTHENTICATED,
    "PERMISSION_DENIED": code_pb2.PERMISSION_DENIED,
    "POOL_NOT_FOUND": code_pb2.NOT_FOUND,
    "VOLUME_NOT_FOUND": code_pb2.NOT_FOUND,
    "GROUP_SNAPSHOT_NOT_FOUND": code_pb2.NOT_FOUND,
    "MEMBER_NOT_FOUND": code_pb2.NOT_FOUND,
    "GROUP_SNAPSHOT_EXISTS": code_pb2.ALREADY_EXISTS,
    "VOLUME_EXISTS": code_pb2.ALREADY_EXISTS,
    "VOLUME_IN_USE": code_pb2.FAILED_PRECONDITION,
    "VOLUME_BUSY": code_pb2.FAILED_PRECONDITION,
    "SNAPSHOT_IN_USE": code_pb2.FAILED_PRECONDITION,
    "VOLUME_CHANGED": code_pb2.FAILED_PRECONDITION,
    "VM_BUSY": code_pb2.FAILED_PRECONDITION,
    "STATE_INVALID": code_pb2.FAILED_PRECONDITION,
    "OPERATION_PENDING": code_pb2.ABORTED,
    "POOL_FULL": code_pb2.RESOURCE_EXHAUSTED,
    "LIMIT_EXCEEDED": code_pb2.RESOURCE_EXHAUSTED,
    "CAPABILITY_MISSING": code_pb2.UNIMPLEMENTED,
    "POOL_UNAVAILABLE": code_pb2.UNAVAILABLE,
    "POOL_TIMEOUT": code_pb2.DEADLINE_EXCEEDED,
    "SNAPSHOT_DAMAGED": code_pb2.DATA_LOSS,
    "COPY_FAILED": code_pb2.DATA_LOSS,
    "INTERNAL": code_pb2.INTERNAL,
}

_RETRY_AFTER_S: dict[str, int] = {"POOL_UNAVAILABLE": 5, "OPERATION_PENDING": 1, "POOL_TIMEOUT": 5}


class Refused(Exception):
    """The gateway's own answer other than success: a reason of the contract, words, and the offending names."""

    def __init__(self, reason: str, message: str, **metadata: str) -> None:
        """Take a reason that the table above knows."""
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = metadata


class BadInput(Refused):
    """Malformed fields. `violations` are pairs of the field's path and what is wrong with it."""

    def __init__(self, violations: list[tuple[str, str]]) -> None:
        """Take at least one violation."""
        field, problem = violations[0]
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        super().__init__("INVALID_ARGUMENT", f"{field}: {problem}{more}", field=field)
        self.violations = violations


def failure_of(error: Exception) -> group_snapshot_pb2.Failure:
    """Return an error as data, to be kept on a group snapshot."""
    if isinstance(error, Refused | ProviderError):
        return group_snapshot_pb2.Failure(
            reason=error.reason, message=error.message, metadata={k: v for k, v in error.metadata.items() if v}
        )
    return group_snapshot_pb2.Failure(
        reason="INTERNAL", message="a fault of the gateway; its log tells more", metadata={}
    )


def status_of(error: Exception, request_id: str) -> grpc.Status:
    """Return the gRPC status of any error; what is not known becomes INTERNAL without its text."""
    failure = failure_of(error)
    metadata = dict(failure.metadata)
    metadata["request_id"] = request_id
    details: list[any_pb2.Any] = [
        _packed(error_details_pb2.ErrorInfo(reason=failure.reason, domain=DOMAIN, metadata=metadata))
    ]
    if isinstance(error, BadInput):
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=field, description=problem)
            for field, problem in error.violations
        ]
        details.append(_packed(error_details_pb2.BadRequest(field_violations=violations)))
    if failure.reason in _RETRY_AFTER_S:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromSeconds(_RETRY_AFTER_S[failure.reason])
        details.append(_packed(retry))
    code = _STATUS_OF_REASON.get(failure.reason, code_pb2.INTERNAL)
    return rpc_status.to_status(status_pb2.Status(code=code, message=failure.message, details=details))


def _packed(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
