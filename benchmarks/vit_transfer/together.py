"""Several tasks on one forward pass of the backbone: exactness and time savings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from restune_diffusion import Tuner, TunerManager, attach
from restune_diffusion.training.feature_cache.tap_features import predict_from_features, record_features

from .backbone import pixel_values, pooled, read_out


@dataclass(frozen=True)
class Served:
    """One task: its bypass tuner and its head."""

    tuner: Tuner
    head: nn.Linear


@torch.no_grad()
def alone(vit: Any, tasks: Mapping[str, Served], images: Tensor) -> dict[str, Tensor]:
    """Return the logits of each task from its own forward pass, with only its tuner attached."""
    logits: dict[str, Tensor] = {}
    for name, served in tasks.items():
        with attach(vit, served.tuner, name):
            logits[name] = served.head(read_out(vit, images))
    return logits


@torch.no_grad()
def together(vit: Any, tasks: Mapping[str, Served], images: Tensor) -> dict[str, Tensor]:
    """Return the logits of each task from one forward pass of the backbone without tuners."""
    taps = {site for served in tasks.values() for part in served.tuner.parts() for site in part.taps}
    features = record_features(vit, taps, pixel_values(images))
    return {
        name: served.head(pooled(predict_from_features(vit, served.tuner, features))) for name, served in tasks.items()
    }


@torch.no_grad()
def _one_by_one(vit: Any, tasks: Mapping[str, Served], images: Tensor) -> None:
    manager = TunerManager.of(vit)
    assert manager is not None
    for name, served in tasks.items():
        manager.set_weights({name: 1.0})
        served.head(read_out(vit, images))
    manager.set_weights(dict.fromkeys(tasks, 1.0))


def compare(vit: Any, tasks: Mapping[str, Served], images: Tensor, repeats: int = 15) -> dict[str, Any]:
    """Return whether one shared pass gives bit-identical logits, and its processor time against separate passes.

    Both are timed alternately in this process, without the time for attaching.
    """
    expected = alone(vit, tasks, images)
    found = together(vit, tasks, images)
    seconds: dict[str, list[float]] = {"one pass": [], "a pass each": []}
    for _ in range(repeats):
        seconds["one pass"].append(_seconds(lambda: together(vit, tasks, images)))
        with attached(vit, tasks):
            seconds["a pass each"].append(_seconds(lambda: _one_by_one(vit, tasks, images)))
    one, each = (statistics.median(times) for times in seconds.values())
    return {
        "tasks": len(tasks),
        "batch": len(images),
        "equal": all(torch.equal(found[name], logits) for name, logits in expected.items()),
        "one_pass_ms": 1000 * one,
        "a_pass_each_ms": 1000 * each,
        "ratio": one / each,
    }


@contextmanager
def attached(vit: Any, tasks: Mapping[str, Served]) -> Iterator[None]:
    """Context manager with the tuner of every task attached under the task's name."""
    with ExitStack() as stack:
        for name, served in tasks.items():
            stack.enter_context(attach(vit, served.tuner, name))
        yield


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
