"""Count the bytes that autograd saves in one training forward pass: bypass, skip and res tuners against PEFT's LoRA.

    python benchmarks/backward_memory.py --output benchmarks/results/backward_memory

The result is a count, not a timing: it is the same on every machine for the same versions and attention kernel. All
methods run in one process on one U-Net with Stable Diffusion 1.5's structure and random weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from restune_diffusion import BypassConfig, ResConfig, SkipConfig, Tuner, attach
from restune_diffusion.training.advice.memory_estimate import kept_storages
from restune_diffusion.tuners.configs import PartConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

SD15 = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}


def build_unet() -> UNet2DConditionModel:
    """Return a frozen U-Net with SD 1.5's structure and random weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter.data.uniform_(-0.02, 0.02, generator=generator)
    return unet


def kept_bytes(forward: Callable[[], torch.Tensor], parameters: set[int]) -> int:
    """Return the bytes that autograd saves in a forward pass, except parameters, which are identified by address."""
    with kept_storages() as storages:
        out = forward()
    assert out.requires_grad
    return sum(storage.nbytes() for storage in storages.values() if storage.data_ptr() not in parameters)


@contextmanager
def lora(unet: Any, rank: int) -> Iterator[int]:
    """Context manager with LoRA on the attention layers, as in diffusers' scripts; yields its parameter count."""
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "peer")
    try:
        yield sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    finally:
        unet.delete_adapters("peer")


@contextmanager
def tuner(unet: Any, config: PartConfig) -> Iterator[int]:
    """Context manager with a new tuner attached; yields its parameter count."""
    fresh = Tuner.for_base(unet, config)
    with attach(unet, fresh):
        yield fresh.num_parameters()


METHODS: dict[str, Callable[[Any], Any]] = {
    "LoRA r=16 (attention)": lambda unet: lora(unet, 16),
    "LoRA r=64 (attention)": lambda unet: lora(unet, 64),
    "skip, ratio 1.0": lambda unet: tuner(unet, SkipConfig(ratio=1.0)),
    "skip, ratio 0.1": lambda unet: tuner(unet, SkipConfig(ratio=0.1)),
    "res, last three transformer blocks": lambda unet: tuner(unet, ResConfig(grad_depth=3)),
    "res, last transformer block": lambda unet: tuner(unet, ResConfig(grad_depth=1)),
    "bypass, ratio 0.125, all taps": lambda unet: tuner(unet, BypassConfig(ratio=0.125, taps=("*",))),
    "bypass, ratio 1": lambda unet: tuner(unet, BypassConfig(ratio=1)),
    "bypass, ratio 0.5 (default)": lambda unet: tuner(unet, BypassConfig()),
}


def measure(size: int) -> list[dict[str, Any]]:
    """Return one row per method, measured on latents of `size` x `size`, batch 1, fp32."""
    unet = build_unet()
    inputs = torch.randn(1, 4, size, size), torch.tensor(500), torch.randn(1, 77, 768)
    rows: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        with method(unet) as count:
            parameters = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
            kept = kept_bytes(lambda: unet(*inputs).sample, parameters)
        rows.append({"method": name, "parameters": count, "MiB": kept / 2**20})
    return [{**row, "ratio": row["MiB"] / rows[0]["MiB"]} for row in rows]


def main() -> None:
    """Run the benchmark, print the table and write it with the command, machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=64, help="side of the latents (default: 64, a 512 px image)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    rows = measure(arguments.size)
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, CPU, fp32, batch 1, latents {arguments.size} x {arguments.size}",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
    }
    lines = ["| method | parameters | kept for backward, MiB | / LoRA r=16 |", "|---|---|---|---|"]
    lines += [f"| {r['method']} | {r['parameters'] / 1e6:.2f}M | {r['MiB']:.0f} | {r['ratio']:.3f} |" for r in rows]
    table = "\n".join(lines)
    print(table)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())  # type: ignore[attr-defined]
        note = f"`{facts['command']}` on {facts['machine']}; {versions}."
        arguments.output.with_suffix(".md").write_text(f"{table}\n\n{note}\n")


if __name__ == "__main__":
    main()
