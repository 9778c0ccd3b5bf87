"""A queue of requests over many tuners: the engine beside diffusers and beside single calls of the pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.serving.workload import GUIDANCE, Workload
from restune_diffusion import TunerCache
from restune_diffusion.serving import Engine, EngineStats, ImageRequest, Limits, TunerLibrary

IMAGES = 8
"""Images of a batch."""


@dataclass
class Outcome:
    """A served queue.

    Args:
        seconds: processor time.
        wall: seconds.
        first: processor time until the first image.
        images: the images, in the order of the requests.
        stats: counters of the engine.
    """

    seconds: float
    wall: float
    first: float
    images: list[Image.Image]
    stats: EngineStats | None = None


class Timer:
    """Processor time and wall time from its creation."""

    def __init__(self) -> None:
        self._start = time.process_time(), time.perf_counter()
        self.first: float | None = None

    def image_done(self) -> None:
        """Keep the time of the first image."""
        if self.first is None:
            self.first = time.process_time() - self._start[0]

    def outcome(self, images: list[Image.Image], stats: EngineStats | None = None) -> Outcome:
        """Return the times until now."""
        seconds, wall = time.process_time() - self._start[0], time.perf_counter() - self._start[1]
        return Outcome(seconds, wall, self.first or seconds, images, stats)


def by_engine(workload: Workload, queue: Sequence[ImageRequest]) -> Outcome:
    """Serve the queue with the engine, with up to eight images per U-Net call."""
    limits = Limits(max_rows=2 * IMAGES, max_queue=len(queue), max_attached=workload.tuners)
    timer = Timer()
    engine = Engine(workload.pipeline, TunerLibrary(workload.folder), limits, clock=time.process_time)
    tickets = [engine.submit(request) for request in queue]
    while engine.step():
        if engine.stats().done:
            timer.image_done()
    outcome = timer.outcome([ticket.result(0).image for ticket in tickets], engine.stats())
    engine.close()
    return outcome


def by_pipeline(workload: Workload, queue: Sequence[ImageRequest]) -> Outcome:
    """Serve the queue with our pipeline, one request per call; each tuner is swapped in from memory."""
    pipe, cache = workload.pipeline, TunerCache(workload.tuners)
    timer, images = Timer(), []
    for place, request in enumerate(queue):
        name = request.tuners[0][0]
        if name.startswith("lora"):
            raise ValueError("the queue must name tuners of this package")
        pipe.load_tuner_weights(workload.file(name), "style", cache=cache, hotswap=place > 0)
        images += _call(pipe, [request])
        timer.image_done()
    pipe.unload_tuner_weights()
    return timer.outcome(images)


def by_diffusers(workload: Workload, queue: Sequence[ImageRequest]) -> Outcome:
    """Serve the queue with diffusers, one request per call; each LoRA is hot-swapped."""
    pipe = _plain(workload.pipeline)
    timer, images = Timer(), []
    for place, request in enumerate(queue):
        _swap(pipe, workload, request, is_first=place == 0)
        images += _call(pipe, [request])
        timer.image_done()
    pipe.unload_lora_weights()
    return timer.outcome(images)


def by_diffusers_batches(workload: Workload, queue: Sequence[ImageRequest]) -> Outcome:
    """Serve the queue with diffusers, the requests of one LoRA in batches of up to eight."""
    pipe = _plain(workload.pipeline)
    timer, images = Timer(), dict[int, Image.Image]()
    by_name: dict[str, list[int]] = {}
    for place, request in enumerate(queue):
        by_name.setdefault(request.tuners[0][0], []).append(place)
    is_first = True
    for places in by_name.values():
        _swap(pipe, workload, queue[places[0]], is_first=is_first)
        is_first = False
        for start in range(0, len(places), IMAGES):
            chosen = places[start : start + IMAGES]
            images.update(zip(chosen, _call(pipe, [queue[place] for place in chosen]), strict=True))
            timer.image_done()
    pipe.unload_lora_weights()
    return timer.outcome([images[place] for place in range(len(queue))])


CONTESTANTS: dict[str, tuple[str, Callable[[Workload, Sequence[ImageRequest]], Outcome]]] = {
    "diffusers, LoRAs hot-swapped request by request": ("lora", by_diffusers),
    "diffusers, batches of one LoRA": ("lora", by_diffusers_batches),
    "our pipeline request by request, skip tuners": ("skip", by_pipeline),
    "engine, the same LoRAs": ("lora", by_engine),
    "engine, skip tuners": ("skip", by_engine),
}


def measure(workload: Workload, rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return a row per contestant, and the speed-up that the plain pipeline has from a batch of eight."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in CONTESTANTS}
    gains: dict[str, list[float]] = {"processor": [], "wall": []}
    for _ in range(rounds):
        for name, (family, serve) in CONTESTANTS.items():
            outcomes[name].append(serve(workload, workload.queue(family)))
        for clock, gain in _batch_gain(workload).items():
            gains[clock].append(gain)
    reference = outcomes["diffusers, LoRAs hot-swapped request by request"][0]
    rows = []
    for name, found in outcomes.items():
        row: dict[str, Any] = {
            "what": name,
            "seconds": median(each.seconds for each in found),
            "wall": median(each.wall for each in found),
            "first": median(each.first for each in found),
            "images": workload.requests,
        }
        if CONTESTANTS[name][0] == "lora":
            row["largest_difference"] = _difference(reference.images, found[-1].images)
        stats = found[-1].stats
        if stats is not None:
            beyond = stats.tuner_seconds + stats.scheduler_seconds + stats.overhead_seconds
            total = beyond + stats.unet_seconds + stats.vae_seconds + stats.text_seconds
            row |= {"overhead": beyond / total, "rows_per_call": stats.total_rows / max(1, stats.calls)}
        rows.append(row)
    first = rows[0]
    for row in rows:
        row["speedup"], row["speedup_wall"] = first["seconds"] / row["seconds"], first["wall"] / row["wall"]
    return rows, {clock: median(values) for clock, values in gains.items()}


def _batch_gain(workload: Workload) -> dict[str, float]:
    """Return how much faster a batch of eight images is than eight calls, of the plain pipeline without tuners."""
    pipe = _plain(workload.pipeline)
    queue = workload.queue("skip")[:IMAGES]
    single = Timer()
    for request in queue:
        _call(pipe, [request])
    one = single.outcome([])
    batch = Timer()
    _call(pipe, queue)
    eight = batch.outcome([])
    return {"processor": one.seconds / eight.seconds, "wall": one.wall / eight.wall}


def _plain(pipeline: Any) -> Any:
    plain = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    return plain


def _swap(pipe: Any, workload: Workload, request: ImageRequest, is_first: bool) -> None:
    path = workload.file(request.tuners[0][0])
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="style", hotswap=not is_first)


def _call(pipe: Any, requests: Sequence[ImageRequest]) -> list[Image.Image]:
    images: list[Image.Image] = pipe(
        [request.prompt for request in requests],
        width=requests[0].width,
        height=requests[0].height,
        num_inference_steps=requests[0].steps,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator("cpu").manual_seed(request.seed or 0) for request in requests],
    ).images
    return images


def _difference(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> int:
    """Return the largest difference of a pixel value, which shows that all contestants generate the same images."""
    pairs = zip(one, other, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)
