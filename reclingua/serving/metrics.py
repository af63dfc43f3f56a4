"""Metrics of the server in the text format of Prometheus."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server; none has a label from the content of a request."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        own: dict[str, Any] = {"namespace": "reclingua", "registry": self.registry}
        self.requests = Counter("requests", "Answered requests", ["path", "status"], **own)
        self.request_seconds = Histogram(
            "request_seconds", "Seconds from a request to its answer", ["path"], buckets=SECONDS, **own
        )
        self.batch_rows = Histogram("batch_rows", "Histories or pairs of a batch", buckets=ROWS, **own)
        self.batch_seconds = Histogram("batch_seconds", "Seconds of a batch", buckets=SECONDS, **own)
        self.queue_length = Gauge("queue_length", "Requests that wait for their batch", **own)
        self.given_up = Counter("given_up", "Requests without an answer", ["reason"], **own)
        self.reloads = Counter("reloads", "Reloads of the catalogues", ["result"], **own)

    def text(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self.registry)


class RequestMetrics:
    """ASGI middleware that counts and times the requests of each route; unknown paths count as `other`."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # the client left before the answer

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception:
            status = 500
            raise
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.request_seconds.labels(path).observe(time.perf_counter() - started)
