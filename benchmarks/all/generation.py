"""Benchmarks of generating: one pass with a tuner, a tuner for each image, swaps, and a queue of styles."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from benchmarks.cuda.bases import twin
from benchmarks.cuda.bench import Bench
from benchmarks.diffusers_lora import ATTENTION
from benchmarks.load_tuner import write_files
from restune_diffusion import SkipConfig, TunerCache, TunerManager, attach, load_tuner
from restune_diffusion.tuners.configs import PartConfig

from . import peers
from .rows import Row, timed_rows
from .training import BYPASS, SKIP, SMALL_SKIP, STYLE, configs, predicted

PLAIN = "plain U-Net"
PEER = "PEFT LoRA r=16"
STYLES = 8
_STD = 1e-3


@torch.no_grad()
def one_pass(bench: Bench, batch: int, side: int) -> list[Row]:
    """Compare one forward pass of the U-Net with each tuner and each peer."""
    base = bench.bases[0]
    dtype = bench.half if bench.device.type == "cuda" else torch.float32
    call, whole = bench.inputs(base, batch, dtype, side), bench.unet(base, dtype)
    ways: dict[str, Callable[[], object]] = {PLAIN: partial(predicted, whole, call)}
    with ExitStack() as stack:
        for name in (SKIP, SMALL_SKIP, BYPASS, STYLE, "res, LoRA r=16"):
            unet = twin(whole)
            stack.enter_context(attach(unet, bench.tuner(unet, configs()[name], std=_STD)))
            ways[name] = partial(predicted, unet, call)
        unet = twin(whole)
        peers.add_lora(unet, 16).to(dtype)
        ways[PEER] = partial(predicted, unet, call)
        if peers.has_swift():
            for name, add in (
                ("ms-swift SCETuning", peers.add_sce_tuner),
                ("ms-swift Res-bypass", peers.add_swift_bypass),
            ):
                unet = twin(whole)
                add(unet).to(dtype)
                ways[name] = partial(predicted, unet, call)
        control = peers.WithControlNet(twin(whole)).to(dtype)
        ways["ControlNet"] = partial(control, call)
        # The second of two equal contestants shows how far the others' figures can be trusted.
        ways[f"{PLAIN}, again"] = partial(predicted, twin(whole), call)
        times = bench.in_turn(ways, seconds=1e6)
    return timed_rows(times, PLAIN)


@torch.no_grad()
def own_tuners(bench: Bench, side: int) -> list[Row]:
    """Compare a batch with a tuner for each image with the same batch with one tuner for all."""
    base = bench.bases[0]
    call, whole = bench.inputs(base, STYLES, torch.float32, side), bench.unet(base, torch.float32)
    one, many = twin(whole), twin(whole)
    with ExitStack() as stack:
        stack.enter_context(attach(one, bench.tuner(one, SkipConfig(ratio=0.1), std=_STD)))
        for number in range(STYLES):
            tuner = bench.tuner(many, SkipConfig(ratio=0.1), seed=number, std=_STD)
            weight = tuple(float(number == image) for image in range(STYLES))
            stack.enter_context(attach(many, tuner, str(number), weight))
        ways: dict[str, Callable[[], object]] = {
            "one tuner for all images": partial(predicted, one, call),
            f"a tuner for each of {STYLES} images": partial(predicted, many, call),
            PLAIN: partial(predicted, whole, call),
        }
        times = bench.in_turn(ways, seconds=1e6)
    return timed_rows(times, "one tuner for all images")


def swaps(bench: Bench) -> list[Row]:
    """Compare ways to bring a file of 40 MB into a U-Net that has a tuner; times of the whole call."""
    base = bench.bases[0]
    whole = bench.unet(base, torch.float32)
    tuner_file, lora_file = write_files(bench.folder, base.structure)
    unet, peer = twin(whole).to(bench.device), twin(whole).to(bench.device)
    cache = TunerCache(2)
    lora = {key.removeprefix("unet."): value for key, value in load_file(lora_file).items()}
    rank = next(iter(value.shape[0] for key, value in lora.items() if "lora_A" in key))
    peers.add_lora(peer, rank)
    targets = {name.replace(".peer", ""): parameter for name, parameter in peer.named_parameters() if "lora_" in name}
    with attach(unet, cache.get(tuner_file), "style"):
        manager = TunerManager.of(unet)
        assert manager is not None
        manager.place(bench.device)

        def copy_lora() -> None:
            with torch.no_grad():
                for key, value in load_file(lora_file).items():
                    targets[key.removeprefix("unet.")].copy_(value)

        ways: dict[str, Callable[[], object]] = {
            "hot swap from the cache": lambda: manager.swap("style", cache.get(tuner_file)),
            "hot swap from the file": lambda: manager.swap("style", load_tuner(tuner_file)),
            "LoRA file copied into PEFT's layers": copy_lora,
        }
        times = _many(bench, ways, 3 if bench.dry else 40)
    size = tuner_file.stat().st_size / 1e6
    return [{**row, "MB": size} for row in timed_rows(times, "LoRA file copied into PEFT's layers")]


def _many(bench: Bench, ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 3):
        for name, way in ways.items():
            seconds = bench.timed(way)
            if number >= 3:
                times[name].append(seconds)
    return times


@torch.no_grad()
def queue_of_styles(bench: Bench, side: int) -> list[Row]:
    """Compare ways to serve a queue of requests with a style each; one forward pass of one image a request."""
    base = bench.bases[0]
    whole = bench.unet(base, torch.float32)
    one_call = bench.inputs(base, 1, torch.float32, side)
    every_call = bench.inputs(base, STYLES, torch.float32, side)
    swapped, batched, loaded = twin(whole), twin(whole), twin(whole)
    config: PartConfig = SkipConfig(ratio=0.1)
    tuners = [bench.tuner(whole, config, seed=number, std=_STD) for number in range(STYLES)]
    for number in range(STYLES):
        loaded.add_adapter(LoraConfig(r=16, target_modules=ATTENTION), f"style{number}")
    with ExitStack() as stack:
        stack.enter_context(attach(swapped, tuners[0].copy(), "style"))
        for number, tuner in enumerate(tuners):
            weight = tuple(float(number == image) for image in range(STYLES))
            stack.enter_context(attach(batched, tuner, str(number), weight))
        manager = TunerManager.of(swapped)
        assert manager is not None

        def by_swapping() -> None:
            for tuner in tuners:
                manager.swap("style", tuner)
                predicted(swapped, one_call)

        def by_peft() -> None:
            for number in range(STYLES):
                loaded.set_adapter(f"style{number}")
                predicted(loaded, one_call)

        def plain() -> None:
            for _ in range(STYLES):
                predicted(whole, one_call)

        ways: dict[str, Callable[[], object]] = {
            "the base alone, one by one": plain,
            "hot swap before each request": by_swapping,
            f"one batch of {STYLES} with their own tuners": partial(predicted, batched, every_call),
            "PEFT: all LoRAs loaded, set_adapter before each request": by_peft,
        }
        times = bench.in_turn(ways, seconds=1e6)
    return timed_rows(times, "the base alone, one by one")


@torch.no_grad()
def scaling_in_tuners(bench: Bench, side: int) -> list[Row]:
    """Compare one pass with 1, 2, 4 and 8 tuners mixed on all images with the plain pass."""
    base = bench.bases[0]
    whole, call = bench.unet(base, torch.float32), bench.inputs(base, 1, torch.float32, side)
    ways: dict[str, Callable[[], object]] = {PLAIN: partial(predicted, whole, call)}
    with ExitStack() as stack:
        for count in (1, 2, 4, 8):
            unet = twin(whole)
            for number in range(count):
                tuner = bench.tuner(unet, SkipConfig(ratio=0.1), seed=number, std=_STD)
                stack.enter_context(attach(unet, tuner, str(number), 1 / count))
            ways[f"{count}"] = partial(predicted, unet, call)
        times = bench.in_turn(ways, seconds=1e6)
    return timed_rows(times, PLAIN)


@torch.no_grad()
def scaling_in_steps(bench: Bench, side: int, steps: int) -> list[Row]:
    """Compare `steps` denoising passes with a skip tuner with the same passes of the base."""
    base = bench.bases[0]
    whole, call = bench.unet(base, torch.float32), bench.inputs(base, 1, torch.float32, side)
    unet = twin(whole)

    def several(model: Any) -> None:
        for _ in range(steps):
            predicted(model, call)

    with attach(unet, bench.tuner(unet, SkipConfig(), std=_STD)):
        times = bench.in_turn({PLAIN: partial(several, whole), SKIP: partial(several, unet)}, seconds=1e6)
    return timed_rows(times, PLAIN)
