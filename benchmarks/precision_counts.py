"""Count kernels and bytes of a training step in half precision, by where autocast is and how an int8 base is stored.

    python -m benchmarks.precision_counts --output benchmarks/results/precision_counts

The result is a count, not a measurement: SD 1.5 and SDXL at full size, one image, on a fake CUDA device with CUDA's
autocast and attention kernels (`tests/integration/cuda/fakes.py`). It needs a C++ compiler; int8 needs torchao.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parents[1] / "build" / "peers"
MIB, GIB = 2**20, 2**30


def half_precision(name: str) -> list[dict[str, Any]]:
    """Count training steps in fp16, with autocast around the base and around the tuner alone."""
    import torch

    fakes = _fakes()
    rows = []
    with fakes.fake_cuda():
        unet = fakes.make_base(name, torch.float16)
        for tuner, part in _parts().items():
            for autocast in (True, False):
                step = fakes.training_step(unet, (part,), "fp16", autocast)
                rows.append({"base": name, "tuner": tuner, "autocast": autocast, "kernels": step.kernels,
                             "written": step.written, "kept": step.kept})  # fmt: skip
    return rows


def quantized(name: str) -> list[dict[str, Any]]:
    """Count training steps beside a base in bf16, one that torchao quantized, and one of `quantize_base`."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from restune_diffusion.training.quantization import quantize_base

    fakes = _fakes()
    ways = {"bf16": lambda unet: None, "torchao": lambda unet: quantize_(unet, Int8WeightOnlyConfig()),
            "int8": quantize_base}  # fmt: skip
    rows = []
    for storage, quantize in ways.items():
        with fakes.fake_cuda():
            unet = fakes.make_base(name, torch.bfloat16)
            quantize(unet)
            for tuner in ("skip", "lora, rank 16"):
                step = fakes.training_step(unet, (_parts()[tuner],), "bf16")
                rows.append({"base": name, "tuner": tuner, "storage": storage, "weights": fakes.weight_bytes(unet),
                             "kept": step.kept})  # fmt: skip
    return rows


def _fakes() -> Any:
    # By name, because the tests are not type-checked.
    return import_module("tests.integration.cuda.fakes")


def _parts() -> dict[str, Any]:
    from restune_diffusion import BypassConfig, ResConfig, SkipConfig

    return {
        "skip": SkipConfig(),
        "bypass": BypassConfig(),
        "res, last 3 blocks": ResConfig(grad_depth=3, width=64),
        "lora, rank 16": ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=16),
        "prefix, exact gate": ResConfig(
            self_attention="prefix", cross_attention="prompt", feed_forward=None, gate="exact"
        ),
        "attention": ResConfig(self_attention="attention", cross_attention="attention", feed_forward=None),
    }


def _change(before: int, after: int, unit: int) -> str:
    return f"{before / unit:,.0f} to {after / unit:,.0f} ({100 * (after / before - 1):+.0f}%)"


def tables(rows: list[dict[str, Any]], int8: list[dict[str, Any]]) -> list[str]:
    """Return the two Markdown tables."""
    lines = ["| base | tuner | kernels | written, MiB | kept for backward, MiB |", "|---|---|---|---|---|"]
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        changes = " | ".join(
            _change(before[name], after[name], unit)
            for name, unit in (("kernels", 1), ("written", MIB), ("kept", MIB))
        )
        lines.append(f"| {before['base']} | {before['tuner']} | {changes} |")
    if int8:
        lines += ["", "| base | tuner | bf16, GiB | int8 by torchao alone | int8 |", "|---|---|---|---|---|"]
    for base, tuner in dict.fromkeys((row["base"], row["tuner"]) for row in int8):
        same = [row for row in int8 if (row["base"], row["tuner"]) == (base, tuner)]
        figures = " | ".join(
            f"{row['weights'] / GIB:.2f} + {row['kept'] / GIB:.2f} = {(row['weights'] + row['kept']) / GIB:.2f}"
            for row in same
        )
        lines.append(f"| {base} | {tuner} | {figures} |")
    return lines


def main() -> None:
    """Run the counts, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    standin = import_module("tests.integration.cuda.standin")
    # Before torch is imported.
    standin.load_guard(standin.compiled_guard())
    from benchmarks.results_file import publish

    sys.path.append(str(PEERS))
    bases = ("SD 1.5", "SDXL")
    rows = [row for base in bases for row in half_precision(base)]
    int8 = [row for base in bases for row in quantized(base)]
    publish(
        "benchmarks.precision_counts", [*rows, *int8], tables(rows, int8), "counted, not measured", arguments.output
    )


if __name__ == "__main__":
    main()
