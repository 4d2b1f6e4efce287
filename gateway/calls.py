"""Around every call: parse, identify, validate, log, count, and turn errors into statuses."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

import grpc
import structlog

from frostgate.v1 import snapshot_provider_pb2
from gateway.auth import Authenticator, Identity
from gateway.decoding import Malformed, deserializer
from gateway.errors import Refused, failure_of, status_of
from gateway.metrics import REQUEST_SECONDS, REQUESTS
from gateway.validation import check
from providers.base import ProviderError

SERVICE = "frostgate.v1.SnapshotProvider"

log = structlog.get_logger()

_identity: ContextVar[Identity] = ContextVar("identity")


def identity() -> Identity:
    """Return who makes the call that is being answered."""
    return _identity.get()


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the contract's methods; other services (health, reflection) pass untouched."""

    def __init__(self, authenticator: Authenticator) -> None:
        """Take who tells the callers."""
        self._authenticator = authenticator
        service = snapshot_provider_pb2.DESCRIPTOR.services_by_name["SnapshotProvider"]
        self._requests = {
            f"/{SERVICE}/{method.name}": getattr(snapshot_provider_pb2, method.input_type.name)
            for method in service.methods
        }

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        request_type = self._requests.get(handler_call_details.method)
        if handler is None or request_type is None:
            return handler
        method = handler_call_details.method.rpartition("/")[2]
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, handler.unary_stream), deserializer(request_type), handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(method, handler.unary_unary), deserializer(request_type), handler.response_serializer
        )

    def _unary(self, method: str, answer: Callable[..., Awaitable[Any]]) -> Any:
        async def call(request: Any, context: Any) -> Any:
            begin = time.monotonic()
            request_id = _begin(method, request, context)
            try:
                self._admit(request, context)
                response = await answer(request, context)
            except Exception as error:  # the call's edge: every error becomes a status
                await _refuse(method, request_id, error, context)
            REQUESTS.labels(method=method, reason="OK").inc()
            REQUEST_SECONDS.labels(method=method).observe(time.monotonic() - begin)
            log.debug("answered", ms=round((time.monotonic() - begin) * 1000, 1))
            return response

        return call

    def _stream(self, method: str, answer: Callable[..., AsyncIterator[Any]]) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            request_id = _begin(method, request, context)
            try:
                self._admit(request, context)
                async for response in answer(request, context):
                    yield response
            except Exception as error:  # the call's edge: every error becomes a status
                await _refuse(method, request_id, error, context)
            REQUESTS.labels(method=method, reason="OK").inc()

        return call

    def _admit(self, request: Any, context: Any) -> None:
        names = [
            name.decode()
            for key in ("x509_common_name", "x509_subject_alternative_name")
            for name in context.auth_context().get(key, [])
        ]
        metadata = dict(context.invocation_metadata() or ())
        _identity.set(self._authenticator.identify(context.peer(), names, metadata))
        if isinstance(request, Malformed):
            raise request.error
        check(request)


def _begin(method: str, request: Any, context: Any) -> str:
    request_id = uuid4().hex[:16]
    structlog.contextvars.bind_contextvars(request=request_id, method=method, peer=context.peer())
    if group_id := getattr(request, "id", ""):
        structlog.contextvars.bind_contextvars(group=group_id[:128])
    return request_id


async def _refuse(method: str, request_id: str, error: Exception, context: Any) -> None:
    reason = failure_of(error).reason
    REQUESTS.labels(method=method, reason=reason).inc()
    if isinstance(error, Refused | ProviderError):
        log.info("refused", reason=reason, error=str(error))
    else:
        log.exception("fault")
    status = status_of(error, request_id)
    context.set_trailing_metadata(status.trailing_metadata)
    await context.abort(status.code, status.details, status.trailing_metadata)
