"""HTTP: a request becomes a call, with what is made to go wrong with it; its outcome becomes the answer."""

from __future__ import annotations

import hmac
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import structlog
from pydantic import ValidationError

from frostgate_storpool_sim import routes
from frostgate_storpool_sim.clusters import Clusters
from frostgate_storpool_sim.errors import Refused, invalid
from frostgate_storpool_sim.faults import Fault, Faults
from frostgate_storpool_sim.routes import Call, Route, Router

MAX_BODY_BYTES = 16 << 20
_log = structlog.get_logger()


class _Cut(Exception):
    """The connection is cut instead of an answer."""


class Api:
    """What is behind the HTTP server. Any thread."""

    def __init__(self, clusters: Clusters, token: str, *, latency_s: float = 0.0, admin: bool = False) -> None:
        """Take the clusters; `latency_s` is waited before every call; `admin` opens /admin."""
        self.clusters = clusters
        self.faults = Faults()
        self._router = Router()
        self._token = token
        self._latency_s = latency_s
        self._admin = admin

    def answer(self, method: str, target: str, authorization: str, body: bytes) -> tuple[int, bytes]:
        """Return status and JSON. Raises _Cut."""
        path, _, query = target.partition("?")
        try:
            self._authenticate(authorization)
            if self._admin and path.startswith("/admin/"):
                return 200, json.dumps(self._administer(method, path, body)).encode()
            route, given, cluster, multi_cluster = self._router.resolve(method, path)
            return 200, self._called(route, given, cluster, multi_cluster, _json(body or _of_query(query)))
        except Refused as refused:
            return refused.status, json.dumps(refused.answer()).encode()

    def _authenticate(self, authorization: str) -> None:
        if not hmac.compare_digest(authorization.encode(), f"Storpool v1:{self._token}".encode()):
            raise Refused("authenticationFailed", "The authentication token is not right.", status=401)

    def _called(self, route: Route, given: dict[str, str], cluster: str, multi_cluster: bool, body: Any) -> bytes:
        time.sleep(self._latency_s)
        faults = self.faults.take(route)
        for fault in faults:
            if fault.kind == "delay":
                time.sleep(fault.delay_s)
            elif fault.kind == "error":
                raise fault.error()
            elif fault.kind == "cut-before":
                raise _Cut
        call = routes.checked(route, given, body, cluster, multi_cluster)
        for fault in faults:
            if fault.kind == "half":
                self.clusters.answer(_halved(call))
                raise fault.error()
        answer = self.clusters.answer(call)
        for fault in faults:
            if fault.kind == "delay-after":
                time.sleep(fault.delay_s)
            elif fault.kind == "error-after":
                raise fault.error()
            elif fault.kind == "cut-after":
                raise _Cut
        return answer

    def _administer(self, method: str, path: str, body: bytes) -> Any:
        asked: dict[tuple[str, str], Callable[[], Any]] = {
            ("GET", "/admin/calls"): lambda: {"calls": self.faults.calls()},
            ("DELETE", "/admin/calls"): self.faults.forget_calls,
            ("GET", "/admin/faults"): lambda: {"faults": [fault.model_dump() for fault in self.faults.waiting()]},
            ("DELETE", "/admin/faults"): self.faults.forget,
            ("POST", "/admin/faults"): lambda: self.faults.add(_fault(body)),
            ("POST", "/admin/capacity"): lambda: self._set_capacity(_json(body)),
        }
        try:
            return asked[method, path]() or {}
        except KeyError:
            raise Refused("notFound", f"There is no {method} {path}", status=404) from None

    def _set_capacity(self, asked: Any) -> None:
        if not isinstance(asked, dict) or not isinstance(asked.get("bytes"), int):
            raise invalid('{"bytes": N} is expected.')
        for cluster in self.clusters.all:
            with cluster.lock, cluster.bytes_lock:
                cluster.settings = replace(cluster.settings, capacity_bytes=asked["bytes"])


class Server(ThreadingHTTPServer):
    """Serves one Api, in a thread of its own."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], api: Api) -> None:
        """Bind. Raises OSError when the address is taken."""
        self.api = api
        self._thread: threading.Thread | None = None
        super().__init__(address, _Request)

    def start(self) -> None:
        """Answer from now on."""
        self._thread = threading.Thread(target=self.serve_forever, name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more. Also when it was not started."""
        if self._thread is not None:
            self.shutdown()
        self.server_close()


class _Request(BaseHTTPRequestHandler):
    server: Server
    timeout = 600

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        started = time.monotonic()
        try:
            status, content = self._answered()
        except _Cut:
            _log.info("connection_cut", method=self.command, path=self.path)
            return
        except Exception as error:
            _log.exception("failed", method=self.command, path=self.path)
            status, content = 500, json.dumps(Refused("internalError", repr(error)).answer()).encode()
        _log.debug("call", method=self.command, path=self.path, status=status, seconds=time.monotonic() - started)
        self.send_response(status)
        self.send_header("Connection", "close")
        self.send_header("Content-Type", "application/json")
        self.send_header("Cache-Control", "private")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _answered(self) -> tuple[int, bytes]:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return 413, json.dumps(invalid(f"At most {MAX_BODY_BYTES} bytes.").answer()).encode()
        body = self.rfile.read(int(length))
        return self.server.api.answer(self.command, self.path, self.headers.get("Authorization", ""), body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: _answer() does."""


def _halved(call: Call) -> Call:
    whole = call.json
    for name in ("volumes", "reassign"):
        listed = getattr(whole, name, None)
        if isinstance(listed, list):
            return replace(call, json=type(whole)({**whole.to_json(), name: listed[: len(listed) // 2]}))
    if isinstance(whole, list):
        return replace(call, json=whole[: len(whole) // 2])
    raise invalid(f"{call.route.query} has no halves.")


def _fault(body: bytes) -> Fault:
    try:
        return Fault.model_validate_json(body)
    except ValidationError as error:
        raise invalid(str(error)) from error


def _of_query(query: str) -> bytes:
    """GET's JSON is in the query. Source: storpool.spapi."""
    return parse_qs(query, errors="strict").get("json", [""])[0].encode()


def _json(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError as error:
        raise Refused("jsonError", str(error)) from error
