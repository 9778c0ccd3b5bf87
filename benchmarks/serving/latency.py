"""Latency under Poisson arrivals: batching at the denoising step, beside batching at the request.

Time is virtual: the processor time of the work, and no time between the end of the work and the next arrival. Other
programs on the machine then do not disturb it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.serving.throughput import IMAGES
from benchmarks.serving.workload import GUIDANCE, Workload
from restune_diffusion.serving import Engine, ImageRequest, Limits, Ticket, TunerLibrary

LOADS = (0.5, 0.8, 0.95)
Arrivals = Sequence[tuple[float, ImageRequest]]


def measure(workload: Workload, steps: Sequence[int], loads: Sequence[float] = LOADS) -> list[dict[str, Any]]:
    """Return a row of latencies per load and way of batching.

    Args:
        workload: the requests; the tuners are skip tuners.
        steps: numbers of steps among which the requests vary.
        loads: arrival rates as fractions of the images per second that the engine reaches with a full queue.
    """
    queue = workload.queue("skip", steps)
    capacity = len(queue) / max(step_batches(workload, [(0.0, request) for request in queue]))
    rows = []
    for load in loads:
        arrivals = list(zip(_poisson(load * capacity, len(queue)), queue, strict=True))
        for what, serve in (("step", step_batches), ("request", request_batches)):
            latencies = serve(workload, arrivals)
            rows.append(
                {
                    "batching": what,
                    "load": load,
                    "steps": list(steps),
                    "p50": float(np.quantile(latencies, 0.5)),
                    "p95": float(np.quantile(latencies, 0.95)),
                    "images_per_second": capacity,
                }
            )
    return rows


def step_batches(workload: Workload, arrivals: Arrivals) -> list[float]:
    """Return the latencies of the engine."""
    limits = Limits(max_rows=2 * IMAGES, max_queue=len(arrivals), max_attached=workload.tuners)
    engine = Engine(workload.pipeline, TunerLibrary(workload.folder), limits)
    _warm(engine, arrivals)
    now, waiting, latencies = 0.0, list(arrivals), list[float]()
    running: list[tuple[float, Ticket]] = []
    while waiting or running:
        if not running:
            now = max(now, waiting[0][0])
        while waiting and waiting[0][0] <= now:
            arrival, request = waiting.pop(0)
            running.append((arrival, engine.submit(request)))
        now += _timed(engine.step)
        latencies += [now - arrival for arrival, ticket in running if ticket.done]
        running = [each for each in running if not each[1].done]
    engine.close()
    return latencies


def request_batches(workload: Workload, arrivals: Arrivals) -> list[float]:
    """Return the latencies of a server that takes up to eight waiting requests of equal steps at a time.

    It uses our pipeline with a tuner per image, so that it need not sort the requests by tuner.
    """
    pipe = workload.pipeline
    for number in range(workload.tuners):
        pipe.load_tuner_weights(workload.file(f"skip-{number}"), f"skip-{number}")
    now, waiting, latencies = 0.0, list(arrivals), []
    while waiting:
        now = max(now, waiting[0][0])
        present = [each for each in waiting if each[0] <= now and each[1].steps == waiting[0][1].steps][:IMAGES]
        waiting = [each for each in waiting if each not in present]
        requests = [request for _, request in present]
        now += _timed(partial(_generate, pipe, requests))
        latencies += [now - arrival for arrival, _ in present]
    pipe.unload_tuner_weights()
    return latencies


def _warm(engine: Engine, arrivals: Arrivals) -> None:
    """Attach the tuners, as the other server does before its first request."""
    seen: set[str] = set()
    for _, request in arrivals:
        name = request.tuners[0][0]
        if name not in seen:
            seen.add(name)
            engine.submit(ImageRequest("", steps=1, width=request.width, height=request.height, tuners=request.tuners))
    while engine.step():
        pass


def _poisson(rate: float, count: int) -> Iterator[float]:
    chance, now = random.Random(1), 0.0
    for _ in range(count):
        now += chance.expovariate(rate)
        yield now


def _timed(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _generate(pipe: Any, requests: Sequence[ImageRequest]) -> None:
    pipe(
        [request.prompt for request in requests],
        width=requests[0].width,
        height=requests[0].height,
        num_inference_steps=requests[0].steps,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator("cpu").manual_seed(request.seed or 0) for request in requests],
        tuners=[request.tuners[0][0] for request in requests],
    )
