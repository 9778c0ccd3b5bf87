"""Count the bytes that autograd saves in a training step, by gradient depth.

    python -m benchmarks.gradient_depth --output benchmarks/results/gradient_depth

The size is Stable Diffusion 1.5's, batch 1, 512 px, fp32. The tuners are a bypass, a bypass with a skip tuner on the
skips of the last N up blocks, that skip tuner alone, and a res tuner in the last N transformer blocks. Tensors have
shapes but no values, as in `benchmarks.preset_memory`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.preset_memory import BASES
from benchmarks.results_file import publish
from restune_diffusion import BypassConfig, ResConfig, SkipConfig, Tuner, attach
from restune_diffusion.training import TrainConfig
from restune_diffusion.training.advice.memory_estimate import build_unet, drop_values, kept_bytes
from restune_diffusion.tuners.configs import PartConfig


def methods(blocks: int) -> dict[str, tuple[PartConfig, ...]]:
    """Return the configs of the tuners to compare, keyed by name."""
    rows: dict[str, tuple[PartConfig, ...]] = {"bypass alone": (BypassConfig(),)}
    for depth in range(1, blocks + 1):
        skip = SkipConfig(ratio=0.1, grad_depth=depth)
        rows[f"bypass + skip, {depth} of {blocks} up blocks"] = (BypassConfig(), skip)
        rows[f"skip alone, {depth} of {blocks} up blocks"] = (skip,)
    rows["res, feed-forward of the last transformer block"] = (ResConfig(grad_depth=1, self_attention=None),)
    for depth in (1, 2, 3, 6):
        rows[f"res, last {depth} transformer block{'s' * (depth > 1)}"] = (ResConfig(grad_depth=depth),)
    rows["res, all transformer blocks"] = (ResConfig(),)
    return rows


def count(unet: Any, mode: Any, configs: tuple[PartConfig, ...]) -> dict[str, Any]:
    """Return the parameter count of a tuner and the MiB that autograd saves in its step."""
    config = TrainConfig(base="base", data=Path("data"), output=Path("out"))
    tuner = Tuner.for_base(unet, *configs)
    with mode:
        drop_values(tuner)
    with attach(unet, tuner), mode:
        kept = kept_bytes(unet, tuner, config, BASES["SD 1.5"][1])
    return {"parameters": tuner.num_parameters(), "MiB": kept / 2**20}


def main() -> None:
    """Run the count, print the table and write it with the command, machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    unet, mode = build_unet(BASES["SD 1.5"][0], torch.float32)
    rows = [{"method": name, **count(unet, mode, configs)} for name, configs in methods(len(unet.up_blocks)).items()]
    table = ["| method | parameters | kept for backward, MiB |", "|---|---|---|"]
    table += [f"| {row['method']} | {row['parameters'] / 1e6:.2f}M | {row['MiB']:.0f} |" for row in rows]
    publish("benchmarks.gradient_depth", rows, table, "counted, not measured", arguments.output)


if __name__ == "__main__":
    main()
