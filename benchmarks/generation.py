"""Time a U-Net forward pass with and without tuners, at Stable Diffusion 1.5's size, in one process.

    python -m benchmarks.generation --output benchmarks/results/generation

The weights are random, in fp32. All variants run in turn, so that load on the machine affects them equally. Times are
processor times, which depend less on other programs than wall-clock times. The peer is a PEFT LoRA on the attention
layers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from benchmarks.backward_memory import SD15
from benchmarks.results_file import publish
from restune_diffusion import BypassConfig, ResConfig, SkipConfig, Tuner, attach
from restune_diffusion.hooks.weights import Weight
from restune_diffusion.tuners.configs import PartConfig

Attach = Callable[[], Any]
SMALL = SkipConfig(ratio=0.1)
ALONE: dict[str, tuple[PartConfig, ...]] = {
    "skip, ratio 0.1": (SMALL,),
    "skip, ratio 1.0": (SkipConfig(),),
    "bypass (default)": (BypassConfig(),),
    "res, adapters beside attention and feed-forward": (ResConfig(),),
    "res, lora r=16 on attention": (ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None),),
    "four skip tuners mixed, ratio 0.1": (SMALL,) * 4,
}


def acting_tuner(unet: nn.Module, config: PartConfig, seed: int) -> Tuner:
    """Return a frozen tuner with nonzero residuals."""
    generator = torch.Generator().manual_seed(seed)
    tuner = Tuner.for_base(unet, config, generator=generator)
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)
    return tuner.requires_grad_(False)


@contextmanager
def attached(unet: nn.Module, tuners: list[Tuner], weights: list[Weight]) -> Iterator[None]:
    """Context manager with the tuners attached at their weights."""
    with ExitStack() as stack:
        for number, (tuner, weight) in enumerate(zip(tuners, weights, strict=True)):
            stack.enter_context(attach(unet, tuner, str(number), weight))
        yield


@contextmanager
def peft_lora(unet: Any) -> Iterator[None]:
    """Context manager with PEFT's LoRA enabled."""
    unet.enable_adapters()
    try:
        yield
    finally:
        unet.disable_adapters()


def measure(unet: Any, ways: dict[str, Attach], batch: int, size: int, rounds: int) -> list[dict[str, Any]]:
    """Run all variants in turn and return their median processor times, with the ratio to the first variant."""
    generator = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    inputs = (torch.randn(batch, 4, size, size, generator=generator), 321, torch.randn(batch, 77, width))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for number in range(rounds + 1):
            for name, context in ways.items():
                with context():
                    start = time.process_time()
                    unet(*inputs)
                    if number:  # warmed up
                        seconds[name].append(time.process_time() - start)
    first = median(next(iter(seconds.values())))
    return [
        {"what": name, "batch": batch, "size": size, "seconds": median(times), "ratio": median(times) / first}
        for name, times in seconds.items()
    ]


def main() -> None:
    """Run the benchmark, print the table and write it with the command, machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="forward passes of each variant (default: 9)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD15).eval().requires_grad_(False)
    tuners = {name: [acting_tuner(unet, c, seed) for seed, c in enumerate(parts)] for name, parts in ALONE.items()}
    alone: dict[str, Attach] = {"no tuner": lambda: attached(unet, [], [])}
    for name, several in tuners.items():
        share = 1 / len(several)
        alone[name] = lambda several=several, share=share: attached(unet, several, [share] * len(several))  # type: ignore[misc]
    eight = [acting_tuner(unet, SMALL, seed) for seed in range(8)]
    each: list[Weight] = [tuple(float(image == row) for row in range(8)) for image in range(8)]
    batched: dict[str, Attach] = {
        "one skip tuner for all images": lambda: attached(unet, eight[:1], [1.0]),
        "a skip tuner for each of 8 images": lambda: attached(unet, eight, each),
        "no tuner": lambda: attached(unet, [], []),
    }
    rows = measure(unet, batched, 8, 16, arguments.rounds)
    # Layers wrapped by PEFT stay wrapped, so its variants run last and have a baseline of their own.
    rows = measure(unet, alone, 1, 32, arguments.rounds) + rows
    unet.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    unet.disable_adapters()
    peer: dict[str, Attach] = {
        "no LoRA (PEFT's layers switched off)": lambda: attached(unet, [], []),
        "LoRA r=16 of PEFT on attention": lambda: peft_lora(unet),
    }
    rows += measure(unet, peer, 1, 32, arguments.rounds)
    table = ["| what | batch | latent | processor time, s | ratio |", "|---|---|---|---|---|"]
    table += [
        f"| {r['what']} | {r['batch']} | {r['size']}x{r['size']} | {r['seconds']:.2f} | {r['ratio']:.3f} |"
        for r in rows
    ]
    publish(
        "benchmarks.generation",
        rows,
        table,
        f"medians of {arguments.rounds} alternating forward passes",
        arguments.output,
    )


if __name__ == "__main__":
    main()
