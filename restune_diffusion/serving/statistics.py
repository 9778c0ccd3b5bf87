"""Counters of an engine: what a monitor reads."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Stage: TypeAlias = Literal["unet", "vae", "text", "tuner", "scheduler"]

LATENCY_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the latency histogram's buckets in seconds; the last bucket has no bound."""


@dataclass
class EngineStats:
    """Counters of an engine since its start; all times are in seconds."""

    queued: int = 0
    """Requests that wait for free rows."""
    running: int = 0
    """Requests that are being denoised."""
    decoding: int = 0
    """Requests whose latents wait for the VAE."""
    rows: int = 0
    """Rows of the last U-Net call."""
    max_rows: int = 0
    """Largest number of rows of a U-Net call."""
    calls: int = 0
    """U-Net calls."""
    total_rows: int = 0
    """Rows of all U-Net calls."""
    submitted: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    """Requests that `submit` refused, those refused because of a full queue included."""
    tuners: int = 0
    """Tuners attached to the base."""
    tuner_hits: int = 0
    """Tuners of requests that were attached already."""
    tuner_misses: int = 0
    """Tuners of requests that had to be attached."""
    tuner_evictions: int = 0
    text_hits: int = 0
    """Prompts whose embeddings were cached."""
    text_misses: int = 0
    unet_seconds: float = 0.0
    vae_seconds: float = 0.0
    text_seconds: float = 0.0
    tuner_seconds: float = 0.0
    """Reading and attaching tuners, in the thread of the engine."""
    scheduler_seconds: float = 0.0
    """Schedulers, guidance and the noise of new requests, which a pipeline computes too."""
    overhead_seconds: float = 0.0
    """Everything else in the engine's steps: batching, copies, bookkeeping."""
    latency_bounds: tuple[float, ...] = LATENCY_BOUNDS
    latency_counts: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS) + 1))
    """Finished images by latency: counts of the buckets, not cumulative."""
    latency_sum: float = 0.0
    """Sum of the latencies of all finished images."""

    def add_latency(self, seconds: float) -> None:
        """Count a finished image."""
        self.latency_counts[bisect_left(self.latency_bounds, seconds)] += 1
        self.latency_sum += seconds


class Stopwatch:
    """Clock of an engine's steps, which adds the seconds of each stage to its counters.

    Args:
        stats: the counters.
        clock: function that returns seconds.
    """

    def __init__(self, stats: EngineStats, clock: Callable[[], float] = time.perf_counter) -> None:
        self._stats = stats
        self._clock = clock
        self._inside = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context manager of a step; what no stage takes is overhead."""
        start, self._inside = self._clock(), 0.0
        try:
            yield
        finally:
            self._stats.overhead_seconds += self._clock() - start - self._inside

    @contextmanager
    def __call__(self, stage: Stage, rows: int = 0) -> Iterator[None]:
        """Context manager of a stage; stages are not nested.

        Args:
            stage: name of the stage.
            rows: rows of a U-Net call.
        """
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._inside += seconds
            name = f"{stage}_seconds"
            setattr(self._stats, name, getattr(self._stats, name) + seconds)
            if rows:
                self._stats.calls += 1
                self._stats.rows = rows
                self._stats.total_rows += rows
                self._stats.max_rows = max(self._stats.max_rows, rows)
