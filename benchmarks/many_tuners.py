"""Count kernels and time the host in a U-Net forward pass with several tuners, beside one tuner for all images.

    python -m benchmarks.many_tuners --output benchmarks/results/many_tuners

The U-Net has the blocks of Stable Diffusion 1.5 at width 32 and 8x8 latents, where the arithmetic takes little time,
and a batch of eight images. All variants run in turn. Kernels are the operations of torch that do not only make a
view. Times are processor times.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.generation import acting_tuner, attached
from benchmarks.host_time import LORA, RANK, SKIP, SMALL
from benchmarks.results_file import publish
from restune_diffusion import ResConfig, TunerManager
from restune_diffusion.hooks.mixing import Layout
from restune_diffusion.hooks.weights import Weight
from restune_diffusion.tuners.configs import PartConfig

IMAGES = 8
CONFIGS: dict[str, PartConfig] = {
    "skip": SKIP,
    "res (adapters)": ResConfig(
        self_attention="adapter", cross_attention="adapter", feed_forward="adapter", width=RANK
    ),
    "lora": LORA,
}
MIXES: dict[str, list[Weight]] = {
    "one for all images": [1.0],
    "two, each for half of the images": [[1.0, 0.0] * 4, [0.0, 1.0] * 4],
    "eight, each for one image": [[float(image == own) for image in range(IMAGES)] for own in range(IMAGES)],
    "four, all for all images": [0.25] * 4,
}


class Kernels(TorchDispatchMode):
    """Counts the operations of torch that do not only make a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run an operation."""
        self.count += not any(
            each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns
        )
        return func(*args, **(kwargs or {}))


class Forward:
    """Forward pass of a U-Net for a batch of eight images."""

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet
        self._inputs = torch.randn(IMAGES, 4, 8, 8), torch.tensor(500), torch.randn(IMAGES, 7, 32)

    def __call__(self) -> None:
        """Run the pass."""
        self._unet(*self._inputs, return_dict=False)

    def seconds(self) -> float:
        """Return the processor time of a pass."""
        start = time.process_time()
        self()
        return time.process_time() - start

    def kernels(self) -> int:
        """Return the number of kernels of a pass."""
        with Kernels() as kernels:
            self()
        return kernels.count


def measure(unet: nn.Module, rounds: int) -> list[dict[str, Any]]:
    """Return kernels and times of the U-Net alone and of each mix of each tuner family."""
    forward = Forward(unet)
    variants: dict[tuple[str, str], tuple[PartConfig, list[Weight]] | None] = {("no tuner", ""): None}
    variants |= {(kind, mix): (config, weights) for kind, config in CONFIGS.items() for mix, weights in MIXES.items()}
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in variants}
    kernels: dict[tuple[str, str], int] = {}
    for _ in range(rounds):
        for name, variant in variants.items():
            config, weights = variant if variant else (SKIP, [])
            tuners = [acting_tuner(unet, config, seed) for seed in range(len(weights))]
            with attached(unet, tuners, weights):
                manager = TunerManager.of(unet)
                if manager is not None:
                    manager.layout = Layout(IMAGES, False, IMAGES)
                forward()
                seconds[name] += [forward.seconds() for _ in range(3)]
                kernels[name] = forward.kernels()
    return [
        {"what": kind, "mix": mix, "kernels": kernels[kind, mix], "ms": 1e3 * median(times)}
        for (kind, mix), times in seconds.items()
    ]


def measure_peer(unet: Any, rounds: int) -> list[dict[str, Any]]:
    """Return kernels and times of PEFT's LoRA; it cannot give each image its own."""
    forward = Forward(unet)
    names = [f"a{number}" for number in range(4)]
    for name in names:
        unet.add_adapter(
            LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), name
        )
    rows = []
    for mix, chosen in (("one for all images", names[:1]), ("four, all for all images", names)):
        unet.set_adapters(chosen)
        forward()
        times = [forward.seconds() for _ in range(3 * rounds)]
        rows.append({"what": "LoRA of PEFT", "mix": mix, "kernels": forward.kernels(), "ms": 1e3 * median(times)})
    return rows


def main() -> None:
    """Run the benchmark, print the table and write it with the command, machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each variant, of three passes (default: 7)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SMALL).eval().requires_grad_(False)
    with torch.no_grad():
        rows = measure(unet, arguments.rounds) + measure_peer(unet, arguments.rounds)
    table = ["| tuners | mix | kernels | of one | processor time, ms | of one |", "|---|---|---|---|---|---|"]
    one = rows[0]
    for row in rows:
        if row["mix"] == "one for all images":
            one = row
        kernels, times = row["kernels"] / one["kernels"], row["ms"] / one["ms"]
        what = f"{row['what']} | {row['mix']} | {row['kernels']}"
        table.append(f"| {what} | {kernels:.2f} | {row['ms']:.1f} | {times:.2f} |")
    how = f"batch of {IMAGES}, medians of {3 * arguments.rounds} alternating passes"
    publish("benchmarks.many_tuners", rows, table, how, arguments.output)


if __name__ == "__main__":
    main()
