"""Images per second and peak memory of training beside PEFT's LoRA, contestants in turn."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from benchmarks.diffusers_lora import ATTENTION, Settings, train_lora
from restune_diffusion import BypassConfig, SkipConfig, Tuner, attach
from restune_diffusion.data.captions import read_examples
from restune_diffusion.data.refusals import Refused
from restune_diffusion.training import TrainConfig, train

from .bases import Base, twin, wrap
from .bench import Bench
from .results import Result, ratio

PEER = "PEFT LoRA r=16"
FASTER = {"skip": 1.2, "bypass": 2.0}
SMALLER = {"skip": 0.85, "bypass": 0.4}


def bytes_on_device(pipeline: Any, device: torch.device) -> int:
    """Return the size of a pipeline's frozen weights on a device."""
    models = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    held = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for model in models
        for tensor in [*model.parameters(), *model.buffers()]
        if tensor.device.type == device.type and not tensor.requires_grad
    }
    return sum(held.values())


@dataclass
class Steps:
    """Progress callback with the times of a run's steps and its peak memory, both without the first step.

    Create it right before the run, which may move the encoders of the pipeline off the device.
    """

    bench: Bench
    pipeline: Any
    marks: list[Any] = field(default_factory=list)
    beyond: int = 0
    """Peak memory beyond the frozen weights that are on the device during training, in bytes."""

    def __post_init__(self) -> None:
        if not self.bench.dry:
            self._others = torch.cuda.memory_allocated() - bytes_on_device(self.pipeline, self.bench.device)

    def __call__(self, _: Any) -> None:
        """Record that a step has ended."""
        if self.bench.dry:
            self.marks.append(time.process_time())
            return
        if not self.marks:
            torch.cuda.reset_peak_memory_stats()
        weights = bytes_on_device(self.pipeline, self.bench.device)
        self.beyond = torch.cuda.max_memory_allocated() - self._others - weights
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    @property
    def seconds(self) -> list[float]:
        """Times of the steps in seconds, without the first one."""
        if self.bench.dry:
            return [after - before for before, after in pairwise(self.marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self.marks)]


def speed_and_memory(bench: Bench) -> Iterator[Result]:
    """Train by our loop and by diffusers' in turn, at batch sizes 1 and 4, both on encoded images."""
    base, dtype = bench.bases[0], torch.bfloat16
    pipeline = bench.pipeline(base, dtype)
    others = wrap(base, {**pipeline.components, "unet": twin(pipeline.unet)})
    common = {
        "base": base.name, "data": bench.images[base.pixels], "prompt": "noise", "resolution": base.pixels,
        "checkpoint_every": 0, "log_with": "none", "cpu": bench.dry, "mixed_precision": "bf16",
    }  # fmt: skip
    steps, rounds = (2, 1) if bench.dry else (10, 2)
    for batch in (1, 4):
        seconds: dict[str, list[float]] = {name: [] for name in (PEER, *FASTER)}
        beyond: dict[str, int] = {}
        for number in range(rounds):
            for name, times in seconds.items():
                bench.tidy()
                progress = Steps(bench, others if name == PEER else pipeline)
                if name == PEER:
                    _peer(bench, others, base, batch, steps + 1, progress)
                else:
                    folder = bench.folder / f"speed-{name}-{batch}-{number}"
                    config = TrainConfig(output=folder, tuner=name, batch_size=batch, steps=steps + 1, **common)
                    train(config, pipeline=pipeline, verbose=False, on_progress=progress)
                times += progress.seconds
                beyond[name] = progress.beyond
        yield from _beside_peer(bench, f", batch {batch}", seconds, batch, "beyond the weights", beyond)


def _beside_peer(
    bench: Bench,
    case: str,
    seconds: Mapping[str, Sequence[float]],
    batch: int,
    of_what: str,
    memory: Mapping[str, float],
) -> Iterator[Result]:
    """Compare speed and memory with those of the peer, from the seconds of each step and the bytes."""
    for name, limit in FASTER.items():
        speeds = {each: batch / median(seconds[each]) for each in (name, PEER)}
        yield ratio(
            bench, f"{name}{case}: images/s / LoRA's", speeds[name] / speeds[PEER], limit, at_least=True,
            note=f"{speeds[name]:.2f} images/s, {len(seconds[name])} steps",
        )  # fmt: skip
    for name, limit in SMALLER.items():
        what = f"{name}{case}: memory {of_what} / LoRA's"
        if bench.dry:
            yield Result(what, "not run", "needs CUDA")
        else:
            note = f"{memory[name] / 2**20:.0f} MiB"
            yield ratio(bench, what, memory[name] / memory[PEER], limit, note=note)


def _peer(bench: Bench, pipeline: Any, base: Base, batch: int, steps: int, progress: Steps) -> None:
    refused: list[Refused] = []
    data = TrainConfig(base="b", data=bench.images[base.pixels], output=bench.folder, prompt="noise").data
    examples = read_examples(data, refused)
    settings = Settings(base.pixels, steps, batch, rank=16, cached=True, mixed_precision="bf16", cpu=bench.dry)
    train_lora(pipeline, examples, settings, progress)


def step_on_sdxl(bench: Bench) -> Iterator[Result]:
    """Compare a bare step in bf16, forward to optimizer, of the largest base at batch 1."""
    base = bench.bases[-1]
    call = bench.inputs(base, 1, torch.bfloat16)
    unets = {name: twin(bench.unet(base, torch.bfloat16)) for name in (PEER, *FASTER)}
    unets[PEER].add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=ATTENTION), "peer")
    configs = {"skip": SkipConfig(), "bypass": BypassConfig()}
    with contextlib.ExitStack() as stack:
        steps: dict[str, Callable[[], None]] = {}
        for name, unet in unets.items():
            trained: nn.Module = unet
            if name in configs:
                trained = Tuner.for_base(unet, configs[name]).to(bench.device)
                stack.enter_context(attach(unet, trained))
            steps[name] = bare_step(partial(_prediction, unet, call), trained.parameters(), call["sample"])
        peaks = {}
        for name, step in steps.items():
            step()
            if not bench.dry:
                bench.tidy()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                step()
                peaks[name] = torch.cuda.max_memory_allocated() - before
        times = bench.in_turn(steps)
    yield from _beside_peer(bench, "", times, 1, "of the step", peaks)


def _prediction(unet: Any, call: dict[str, Any]) -> torch.Tensor:
    predicted: torch.Tensor = unet(**call, return_dict=False)[0]
    return predicted


def bare_step(
    forward: Callable[[], torch.Tensor], parameters: Iterable[nn.Parameter], sample: torch.Tensor
) -> Callable[[], None]:
    """Return a training step without data: forward in the dtype of `sample`, backward, clipping, AdamW in fp32."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    target = torch.randn_like(sample)

    def step() -> None:
        with torch.autocast(sample.device.type, torch.bfloat16, enabled=sample.dtype != torch.float32):
            prediction = forward()
        nn.functional.mse_loss(prediction.float(), target.float()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
