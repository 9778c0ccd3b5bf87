"""Prometheus metrics of the engine and of the HTTP API."""

from __future__ import annotations

import time
from collections.abc import Iterable, MutableMapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from .gate import Application, Receive, Scope, Send

if TYPE_CHECKING:
    from ..engine import Engine

_GAUGES = {
    "queued": ("restune_queue_length", "Requests that wait for free rows."),
    "running": ("restune_running_images", "Images that are being denoised."),
    "decoding": ("restune_decoding_images", "Images whose latents wait for the VAE."),
    "rows": ("restune_unet_rows", "Rows of the last U-Net call."),
    "max_rows": ("restune_unet_rows_limit", "Largest number of rows of a U-Net call."),
    "tuners": ("restune_attached_tuners", "Tuners attached to the base."),
}
_COUNTERS = {
    "calls": ("restune_unet_calls", "U-Net calls."),
    "total_rows": ("restune_unet_calls_rows", "Rows of all U-Net calls."),
    "submitted": ("restune_images_submitted", "Images that the engine has accepted."),
    "done": ("restune_images", "Finished images."),
    "failed": ("restune_images_failed", "Images that failed."),
    "cancelled": ("restune_images_cancelled", "Images that were cancelled."),
    "refused": ("restune_images_refused", "Images that the engine has refused."),
    "tuner_hits": ("restune_tuner_cache_hits", "Tuners of requests that were attached already."),
    "tuner_misses": ("restune_tuner_cache_misses", "Tuners of requests that had to be attached."),
    "tuner_evictions": ("restune_tuner_cache_evictions", "Tuners that were detached to make room."),
    "text_hits": ("restune_text_cache_hits", "Prompts whose embeddings were cached."),
    "text_misses": ("restune_text_cache_misses", "Prompts that had to be encoded."),
}
_SECONDS = ("unet", "vae", "text", "tuner", "overhead")
_LATENCY_BOUNDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class EngineCollector(Collector):
    """Metrics that are read from the engine when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics."""
        stats = self._engine.stats()
        for attribute, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(stats, attribute))
        for attribute, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(stats, attribute))
        seconds = CounterMetricFamily("restune_engine_seconds", "Seconds of the engine by part.", labels=["part"])
        for part in _SECONDS:
            seconds.add_metric([part], getattr(stats, f"{part}_seconds"))
        yield seconds
        latency = HistogramMetricFamily("restune_image_latency_seconds", "Seconds from acceptance to finished image.")
        bounds = [*(f"{bound:g}" for bound in stats.latency_bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(stats.latency_counts), strict=True))
        latency.add_metric([], buckets, stats.latency_sum)
        yield latency


class Metrics:
    """Registry of one server.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        self.requests = Counter(
            "restune_http_requests", "HTTP requests.", ["route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "restune_http_request_seconds",
            "Seconds of an HTTP request.",
            ["route"],
            buckets=_LATENCY_BOUNDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def counted(self, app: Application) -> Application:
        """Return an application whose requests are counted by route and status."""

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            status = 499
            started = time.perf_counter()

            async def counting(message: MutableMapping[str, Any]) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, counting)
            finally:
                # Routes and not paths: a client can invent any number of paths.
                route = getattr(scope.get("route"), "path", "none")
                self.requests.labels(route, str(status)).inc()
                self.seconds.labels(route).observe(time.perf_counter() - started)

        return application
