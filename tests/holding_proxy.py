"""A gRPC proxy before a real gateway that can hold one method's calls: the storage or network that hangs."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

_STREAMS = ("WatchGroupSnapshot", "ReadBlocks", "ListAllocatedExtents", "ListChangedExtents")


class HoldingProxy(grpc.GenericRpcHandler):
    """Forwards everything; calls of `method` wait until release is set. What is held was not forwarded yet."""

    def __init__(self, upstream: str, socket: Path, method: str) -> None:
        self.address = f"unix:{socket}"
        self.held = threading.Event()
        self.release = threading.Event()
        self._method = method
        self._channel = grpc.insecure_channel(upstream)
        self._server = grpc.server(ThreadPoolExecutor(8), handlers=[self])
        self._server.add_insecure_port(self.address)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        if method.endswith(_STREAMS):
            return grpc.unary_stream_rpc_method_handler(lambda request, context: self._stream(method, request, context))
        return grpc.unary_unary_rpc_method_handler(lambda request, context: self._call(method, request, context))

    def _call(self, method: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        if method.endswith(self._method):
            self.held.set()
            self.release.wait(60)
        try:
            answer: bytes = self._channel.unary_unary(method)(request, timeout=30)
        except grpc.RpcError as error:
            _pass_on(error, context)
        return answer

    def _stream(self, method: str, request: bytes, context: grpc.ServicerContext) -> Any:
        try:
            yield from self._channel.unary_stream(method)(request, timeout=60)
        except grpc.RpcError as error:
            _pass_on(error, context)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release.set()
        self._server.stop(1).wait()
        self._channel.close()


def _pass_on(error: Any, context: grpc.ServicerContext) -> None:
    context.set_trailing_metadata(error.trailing_metadata())
    context.abort(error.code(), error.details())
