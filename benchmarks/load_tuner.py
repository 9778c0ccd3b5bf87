"""Time `load_tuner` against reading a LoRA file of equal size, in one process.

    python -m benchmarks.load_tuner --output benchmarks/results/load_tuner

Both files are fp16, of Stable Diffusion 1.5's structure with random values, and in the page cache. `load_tuner` reads
every value once, to reject NaN and infinity. safetensors' `load_file`, the first step of diffusers'
`load_lora_weights`, maps the file without reading values. The fair baseline also copies the values, which is the
second step of `load_lora_weights`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.backward_memory import SD15
from benchmarks.results_file import publish
from restune_diffusion import SkipConfig, Tuner, load_tuner, read_info, save_tuner

_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def write_files(folder: Path, structure: Mapping[str, Any] = SD15) -> tuple[Path, Path]:
    """Write a skip tuner of ratio 1.0, and an attention LoRA whose rank gives the nearest size; return both paths."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**structure)
    tuner = Tuner.for_base(unet, SkipConfig(ratio=1.0), generator=torch.Generator().manual_seed(0)).half()
    save_tuner(tuner, folder / "tuner.safetensors")
    layers = {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(_LORA_TARGETS) and isinstance(module, nn.Linear)
    }
    rank = round(tuner.num_parameters() / sum(each.in_features + each.out_features for each in layers.values()))
    lora: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        lora[f"unet.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features).half()
        lora[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank).half()
    save_file(lora, folder / "lora.safetensors")
    return folder / "tuner.safetensors", folder / "lora.safetensors"


def measure(rounds: int) -> list[dict[str, Any]]:
    """Time all loading functions in turn, `rounds` times, so that load on the machine affects them equally."""
    with tempfile.TemporaryDirectory() as folder:
        tuner, lora = write_files(Path(folder))
        ways: dict[str, tuple[Path, Callable[[], object]]] = {
            "load_file, LoRA, values copied": (lora, lambda: [each.clone() for each in load_file(lora).values()]),
            "load_file, LoRA, no value read": (lora, lambda: load_file(lora)),
            "load_tuner, skip, ratio 1.0": (tuner, lambda: load_tuner(tuner)),
            "read_info of it (header alone)": (tuner, lambda: read_info(tuner)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 3):
            for name, (_, read) in ways.items():
                start = time.perf_counter()
                read()
                if number >= 3:  # warmed up
                    seconds[name].append(time.perf_counter() - start)
        sizes = {name: path.stat().st_size for name, (path, _) in ways.items()}
    peer = median(seconds["load_file, LoRA, values copied"])
    return [
        {
            "what": name,
            "MB": sizes[name] / 1e6,
            "median_ms": 1e3 * median(times),
            "min_ms": 1e3 * min(times),
            "ratio": median(times) / peer,
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    """Run the benchmark, print the table and write it with the command, machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=100, help="reads of each file (default: 100)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    rows = measure(arguments.rounds)
    lines = ["| what | file, MB | median, ms | fastest, ms | median / copying a LoRA |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['what']} | {r['MB']:.1f} | {r['median_ms']:.2f} | {r['min_ms']:.2f} | {r['ratio']:.2f} |" for r in rows
    ]
    publish("benchmarks.load_tuner", rows, lines, f"{arguments.rounds} alternating rounds", arguments.output)


if __name__ == "__main__":
    main()
