"""Train a method on a task, choose its learning rate on validation images, and count its training memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.backward_memory import kept_bytes
from restune_diffusion import Tuner

from .methods import Learner, Method
from .tasks import LabeledImages, Task

WARMUP = 0.1


@dataclass(frozen=True)
class Course:
    """Training settings of every method: AdamW, linear warm-up, cosine decay."""

    steps: int = 100
    batch: int = 32
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Learned:
    """Result of one training run."""

    head: nn.Linear
    tuner: Tuner | None
    validation: float
    validation_loss: float
    test: float
    parameters: int
    kept: int


def learn(vit: Any, method: Method, task: Task, rate: float, seed: int, course: Course) -> Learned:
    """Train a method on a task and evaluate it on the validation and test images.

    Args:
        vit: the frozen backbone; it is not changed.
        method: the method to train.
        task: the images.
        rate: peak learning rate.
        seed: seed of the initial parameters and of the order of images.
        course: training settings.
    """
    generator = torch.Generator().manual_seed(seed)
    # A zero head gives every method the same start.
    head = nn.Linear(vit.config.hidden_size, task.classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with method.build(vit, generator) as learner:
        trained = [*learner.trained, *head.parameters()]
        kept = _kept(learner, head, task, trained, course.batch)
        _train(learner, head, task.train, trained, rate, generator, course)
        validation, loss = _score(learner, head, task.validation)
        test, _ = _score(learner, head, task.test)
    return Learned(head, learner.tuner, validation, loss, test, sum(p.numel() for p in trained), kept)


def _train(
    learner: Learner,
    head: nn.Linear,
    images: LabeledImages,
    trained: list[nn.Parameter],
    rate: float,
    generator: torch.Generator,
    course: Course,
) -> None:
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=course.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, course.steps))
    for _ in range(course.steps):
        picks = torch.randint(len(images.labels), (course.batch,), generator=generator)
        loss = F.cross_entropy(head(learner.features(images.pixels[picks])), images.labels[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _factor(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))


def _kept(learner: Learner, head: nn.Linear, task: Task, trained: list[nn.Parameter], batch: int) -> int:
    """Return the bytes that autograd saves for a training batch, without frozen or trained parameters."""
    pixels = task.train.pixels[:batch]
    known = {p.untyped_storage().data_ptr() for p in [*trained, *learner.backbone.parameters()]}
    return kept_bytes(lambda: head(learner.features(pixels)), known)


@torch.no_grad()
def _score(learner: Learner, head: nn.Linear, images: LabeledImages) -> tuple[float, float]:
    """Return accuracy and cross-entropy."""
    logits = torch.cat([head(learner.features(part)) for part in images.pixels.split(128)])
    accuracy = (logits.argmax(1) == images.labels).float().mean().item()
    return accuracy, F.cross_entropy(logits, images.labels).item()


def sweep(vit: Any, method: Method, task: Task, course: Course, seed: int = 0) -> dict[float, Learned]:
    """Train at every learning rate of a method; sort by validation accuracy, then by loss, best first."""
    tried = {rate: learn(vit, method, task, rate, seed, course) for rate in method.rates}
    return dict(sorted(tried.items(), key=lambda item: (-item[1].validation, item[1].validation_loss)))
