"""Part `training`: every kind and precision trains, resumes and survives an overflow; speed and memory beside LoRA."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from restune_diffusion import Tuner, load_tuner
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.build import build_accelerator, build_training_state
from restune_diffusion.training.inputs import prepared
from restune_diffusion.training.loop import steps_of
from restune_diffusion.training.quantization import quantize_base
from restune_diffusion.training.state import TrainState
from restune_diffusion.training.trainer import acting

from .bases import Base, wrap
from .bench import DTYPES, Bench
from .results import CannotRun, Check, Result, at_most, holds
from .training_speed import speed_and_memory, step_on_sdxl

KINDS: dict[str, dict[str, Any]] = {
    "skip": {"tuner": "skip"},
    "bypass": {"tuner": "bypass"},
    "res": {"tuner": "res"},
    "lora": {"tuner": "lora"},
    "control": {"tuner": "control", "control": {"conditions": ("canny",)}},
    "text": {"tuner": "text"},
}
STEPS = 10
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def config_of(bench: Bench, base: Base, name: str, **settings: Any) -> TrainConfig:
    """Return the config of a training run in a folder of its own."""
    common = {
        "base": base.name, "data": bench.images[base.pixels], "output": bench.folder / name, "prompt": "noise",
        "resolution": base.pixels, "steps": STEPS, "learning_rate": 1e-3, "checkpoint_every": 0, "log_with": "none",
        "cpu": bench.dry,
    }  # fmt: skip
    return TrainConfig(**{**common, **settings})


@contextlib.contextmanager
def state_of(config: TrainConfig, pipeline: Any) -> Iterator[TrainState]:
    """Context manager with the state of a run whose tuner is attached."""
    accelerator = build_accelerator(config)
    with prepared(config, accelerator, pipeline) as inputs:
        run = build_training_state(config, accelerator, inputs)
        with acting(run):
            yield run


def every_kind(bench: Bench) -> Iterator[Result]:
    """Train ten steps of each kind in each precision."""
    for base in bench.bases:
        # At SDXL's size, each precision with one kind, and each cheap kind in bf16.
        some = {"fp32": ["bypass"], "fp16": ["skip"], "bf16": ["skip", "bypass", "lora"]}
        for precision, dtype in DTYPES.items():
            if bench.dry and precision == "fp16":
                yield Result(f"{base.name}, fp16", "not run", "needs CUDA")
                continue
            pipeline = bench.pipeline(base, dtype)
            for kind in some[precision] if base.is_xl else KINDS:
                yield _trains(bench, base, kind, precision, pipeline)


def _trains(bench: Bench, base: Base, kind: str, precision: str, pipeline: Any) -> Result:
    what = f"{base.name}, {kind}, {precision}"
    mixed = {"fp32": "no"}.get(precision, precision)
    config = config_of(bench, base, what.replace(" ", "-"), mixed_precision=mixed, **KINDS[kind])
    result = train(config, pipeline=pipeline, verbose=False)
    start = Tuner.for_pipeline(pipeline, *config.parts, generator=torch.Generator().manual_seed(config.seed))
    trained = load_tuner(result.path).state_dict()
    moved = [key for key, value in start.state_dict().items() if not torch.equal(value.cpu(), trained[key].float())]
    good = all(map(math.isfinite, result.losses)) and result.steps == STEPS and len(moved) == len(trained)
    return holds(what, good, f"{len(moved)} of {len(trained)} tensors learned", f"{STEPS} steps, all")


def overflow(bench: Bench) -> Iterator[Result]:
    """Set an fp16 loss scale that overflows: this step is skipped and leaves the tuner, the next one trains it."""
    base = bench.bases[0]
    config = config_of(bench, base, "overflow", mixed_precision="fp16", tuner="skip", steps=4)
    with state_of(config, bench.pipeline(base, torch.float16)) as run:
        steps = steps_of(run, [])
        next(steps)
        before = [parameter.detach().clone() for parameter in run.tuner.parameters()]
        run.accelerator.scaler.update(new_scale=3e38)
        next(steps)
        skipped = bool(run.optimizer.step_was_skipped)
        kept = all(map(torch.equal, before, run.tuner.parameters()))
        run.accelerator.scaler.update(new_scale=2.0**10)
        next(steps)
        learned = not all(map(torch.equal, before, run.tuner.parameters()))
    yield holds("the overflowing step is skipped", skipped and kept)
    yield holds("the next step trains", learned)


def resuming(bench: Bench) -> Iterator[Result]:
    """Compare six steps with three steps and three resumed ones."""
    base = bench.bases[0]
    pipeline = bench.pipeline(base, torch.float32)
    settings = {"checkpoint_every": 3, "caption_dropout": 0.2}
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        # The other kernels for attention add up their gradients in any order.
        with sdpa_kernel(SDPBackend.MATH):
            for kind in ("skip", "bypass", "lora"):
                made: list[Path] = []
                for name, steps in (("whole", (6,)), ("parts", (3, 6))):
                    for last in steps:
                        config = config_of(
                            bench, base, f"{kind}-{name}", tuner=kind, steps=last, resume=last > steps[0], **settings
                        )
                        config.file.unlink(missing_ok=True)
                        made.append(train(config, pipeline=pipeline, verbose=False).path)
                whole, parts = (load_tuner(path).state_dict() for path in (made[0], made[-1]))
                apart = max(float((whole[key] - parts[key]).abs().max()) for key in whole)
                yield at_most(f"{kind}, largest difference of a weight", apart, 0.0 if bench.dry else 1e-6)
    finally:
        torch.backends.cudnn.deterministic = deterministic


def quantized_memory(bench: Bench) -> Iterator[Result]:
    """Compare the peak memory of training on a base in int8 with that on a base in bf16."""
    try:
        import torchao  # noqa: F401
    except ImportError:
        raise CannotRun("needs torchao") from None
    base = bench.bases[0]
    whole = bench.pipeline(base, torch.bfloat16)
    peaks: dict[str, float] = {}
    for name in ("bf16", "int8"):
        unet = copy.deepcopy(whole.unet).cpu()
        if name == "int8":
            quantize_base(unet)
        pipeline = wrap(base, {**whole.components, "unet": unet.to(bench.device)})
        whole.unet.cpu()
        config = config_of(bench, base, f"memory-{name}", mixed_precision="bf16", tuner="bypass", steps=3)
        bench.tidy()

        def start_over(report: Any) -> None:
            if report.step == 1:
                torch.cuda.reset_peak_memory_stats()

        train(config, pipeline=pipeline, verbose=False, on_progress=start_over)
        peaks[name] = torch.cuda.max_memory_allocated() / 2**20
        del pipeline, unet
        whole.unet.to(bench.device)
    yield at_most("MiB at int8 (limit: bf16)", peaks["int8"], peaks["bf16"] - 1, ".0f")


def waits(bench: Bench) -> Iterator[Result]:
    """Count how often the host waits for the device in a training step."""
    base, steps = bench.bases[0], 5
    for kind in ("skip", "bypass", "lora"):
        config = config_of(bench, base, f"waits-{kind}", mixed_precision="bf16", tuner=kind)
        with state_of(config, bench.pipeline(base, torch.bfloat16)) as run:
            course = steps_of(run, [])
            for _ in range(3):
                next(course)
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(steps):
                    next(course)
        counts = {event.key: event.count for event in profile.key_averages()}
        # The profiler itself synchronizes the device when it stops.
        own = counts.get("cudaDeviceSynchronize", 0)
        count = sum(counts.get(name, 0) for name in _WAITS) + (own if own >= steps else 0)
        yield at_most(kind, count / steps, 1.0, ".1f")


CHECKS = (
    Check(f"{STEPS} steps of each kind and precision", every_kind),
    Check("An overflow in fp16", overflow, needs_cuda=True),
    Check("6 steps are 3 and 3 resumed ones", resuming),
    Check("Training beside PEFT's LoRA r=16 in diffusers' loop", speed_and_memory),
    Check("A step at SDXL's size beside PEFT's LoRA r=16", step_on_sdxl),
    Check("Peak memory with the base in int8", quantized_memory, needs_cuda=True),
    Check("Waits for the device in a step", waits, needs_cuda=True),
)
