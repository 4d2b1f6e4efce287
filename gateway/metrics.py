"""Prometheus metrics. Names and labels are part of the interface: dashboards hang on them."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, start_http_server

REQUESTS = Counter(
    "frostgate_requests_total", "Calls answered, by method and reason (OK when it went well).", ["method", "reason"]
)
REQUEST_SECONDS = Histogram("frostgate_request_seconds", "Time to answer unary calls.", ["method"])
CUT_SECONDS = Histogram(
    "frostgate_cut_seconds",
    "Time the storages took for the cut of a group snapshot: the storage's part of the freeze window.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
UNDONE = Counter("frostgate_undone_total", "Reservations and unconfirmed snapshots that the gateway undid.", ["why"])
FAILED = Counter("frostgate_failed_total", "Group snapshots that became FAILED, by reason.", ["reason"])
BUSY_THREADS = Gauge("frostgate_pool_busy_threads", "Provider calls under way or hanging.", ["pool", "lane"])


def serve(address: str) -> None:
    """Serve /metrics on "host:port" from a daemon thread. Raises OSError when the port is taken."""
    host, _, port = address.rpartition(":")
    start_http_server(int(port), host.strip("[]"))
