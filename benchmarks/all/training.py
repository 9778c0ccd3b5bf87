"""Benchmark of a training step: tuners beside LoRA, ms-swift's modules, ControlNet, and the forward pass alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.backward_memory import kept_bytes
from benchmarks.cuda.bases import Base, twin
from benchmarks.cuda.bench import LORA, Bench
from benchmarks.cuda.training_speed import bare_step
from restune_diffusion import BypassConfig, ResConfig, SkipConfig, Tuner, attach
from restune_diffusion.training import TrainConfig
from restune_diffusion.training.feature_cache.tap_features import predict_from_features, record_features
from restune_diffusion.tuners.configs import PartConfig

from . import peers
from .rows import Row, timed_rows

LIMIT, PEER = "forward alone, without gradients", "PEFT LoRA r=16"
FEATURES = "bypass, from cached features"
STYLE = "`style` preset (res, last three blocks)"
BYPASS, SKIP, SMALL_SKIP = "bypass", "skip", "skip, ratio 0.1"
Contestant = tuple[Callable[[], torch.Tensor], nn.Module]


def configs() -> dict[str, PartConfig]:
    """Return the tuners of ours that are compared."""
    (style,) = TrainConfig(base="base", data="data", output="output", preset="style").parts
    return {
        BYPASS: BypassConfig(),
        SKIP: SkipConfig(),
        SMALL_SKIP: SkipConfig(ratio=0.1),
        STYLE: style,
        "res, adapters": ResConfig(),
        "res, LoRA r=16": LORA,
    }


def predicted(unet: Any, call: dict[str, Any]) -> torch.Tensor:
    """Return the prediction of a U-Net."""
    out: torch.Tensor = unet(**call, return_dict=False)[0]
    return out


def contestants(bench: Bench, base: Base, call: dict[str, Any], stack: ExitStack) -> Iterator[tuple[str, Contestant]]:
    """Yield the forward pass and the trained module of each contestant, on U-Nets that share their weights."""
    whole = bench.unet(base, torch.float32)
    for name, config in configs().items():
        unet = twin(whole)
        tuner = Tuner.for_base(unet, config, generator=torch.Generator().manual_seed(0)).to(bench.device)
        stack.enter_context(attach(unet, tuner))
        yield name, (partial(predicted, unet, call), tuner)
    yield FEATURES, _from_features(bench, whole, call)
    for rank, checkpointing in ((4, False), (16, False), (64, False), (16, True)):
        unet = twin(whole)
        name = f"PEFT LoRA r={rank}" + (", gradient checkpointing" if checkpointing else "")
        yield name, (partial(predicted, unet, call), peers.add_lora(unet, rank, checkpointing))
    if peers.has_swift():
        for name, add in (
            ("ms-swift SCETuning", peers.add_sce_tuner),
            ("ms-swift Res-bypass", peers.add_swift_bypass),
        ):
            unet = twin(whole)
            yield name, (partial(predicted, unet, call), add(unet))
    control = peers.WithControlNet(twin(whole)).to(bench.device)
    yield "ControlNet", (partial(control, call), control.net)


def _from_features(bench: Bench, unet: Any, call: dict[str, Any]) -> Contestant:
    tuner = Tuner.for_base(unet, BypassConfig(), generator=torch.Generator().manual_seed(0)).to(bench.device)
    (part,) = tuner.parts()
    timesteps = call["timestep"].expand(len(call["sample"]))
    features = record_features(
        unet, part.taps, call["sample"], timesteps, encoder_hidden_states=call["encoder_hidden_states"]
    )
    # As read from disk.
    stored = features.to(torch.device("cpu"), torch.float16)

    def forward() -> torch.Tensor:
        return predict_from_features(unet, tuner, stored.to(bench.device, torch.float32))

    return forward, tuner


def training_step(bench: Bench, batch: int, side: int) -> list[Row]:
    """Compare the training steps of all contestants in turn."""
    base = bench.bases[0]
    call = bench.inputs(base, batch, torch.float32, side)
    whole = bench.unet(base, torch.float32)
    held = {parameter.untyped_storage().data_ptr() for parameter in whole.parameters()}

    def forward_alone() -> None:
        with torch.no_grad():
            predicted(whole, call)

    ways: dict[str, Callable[[], object]] = {LIMIT: forward_alone}
    kept: dict[str, int] = {LIMIT: 0}
    parameters: dict[str, int] = {LIMIT: 0}
    with ExitStack() as stack:
        for name, (forward, module) in contestants(bench, base, call, stack):
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            parameters[name] = sum(parameter.numel() for parameter in trained)
            own = held | {parameter.untyped_storage().data_ptr() for parameter in trained}
            kept[name] = kept_bytes(forward, own)
            ways[name] = bare_step(forward, trained, call["sample"])
        # The forward passes that were counted have warmed up.
        times = bench.in_turn(ways, seconds=1e6, warm=False)
    images = {name: batch / median(each) for name, each in times.items()}
    ratios = {name: value / kept[PEER] for name, value in kept.items()}
    return timed_rows(times, PEER, parameters=parameters, kept_bytes=kept, kept_ratio=ratios, images_per_second=images)


def scaling_step(bench: Bench, batch: int, side: int) -> list[Row]:
    """Compare the steps of a few contestants at one batch size and resolution."""
    base = bench.bases[0]
    call = bench.inputs(base, batch, torch.float32, side)
    whole = bench.unet(base, torch.float32)

    def forward_alone() -> None:
        with torch.no_grad():
            predicted(whole, call)

    ways: dict[str, Callable[[], object]] = {LIMIT: forward_alone}
    with ExitStack() as stack:
        for name in (BYPASS, SKIP):
            unet = twin(whole)
            tuner = Tuner.for_base(unet, configs()[name], generator=torch.Generator().manual_seed(0)).to(bench.device)
            stack.enter_context(attach(unet, tuner))
            ways[name] = bare_step(partial(predicted, unet, call), tuner.parameters(), call["sample"])
        unet = twin(whole)
        peers.add_lora(unet, 16)
        ways[PEER] = bare_step(partial(predicted, unet, call), unet.parameters(), call["sample"])
        times = bench.in_turn(ways, seconds=1e6)
    return timed_rows(times, PEER)
