"""Time what the host does in a U-Net forward pass, beside PEFT's LoRA: a GPU at batch 1 waits for it in eager mode.

    python -m benchmarks.host_time --output benchmarks/results/host_time

The U-Net has the blocks of Stable Diffusion 1.5 at width 32 and 8x8 latents, where the arithmetic takes little time.
PEFT's LoRA is on the layers of `lora`. All variants run in turn. Times are processor times, of which the least is
taken. The number of function calls is counted, so it is the same on every machine for the same versions.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.backward_memory import SD15
from benchmarks.generation import acting_tuner, attached
from benchmarks.results_file import publish
from restune_diffusion import BypassConfig, ResConfig, SkipConfig, TunerManager, TunerWeight, schedule
from restune_diffusion.hooks.mixing import Layout
from restune_diffusion.hooks.weights import Weight
from restune_diffusion.tuners.configs import PartConfig

SMALL = {
    **SD15,
    "block_out_channels": (32, 32, 32, 32),
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "sample_size": 8,
}
RANK = 4
LORA = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=RANK)
SKIP = SkipConfig(ratio=0.5)
MASK = TunerWeight(mask=torch.ones(8, 8))
VARIANTS: dict[str, tuple[PartConfig, Weight]] = {
    "lora": (LORA, 1.0),
    "lora, weight 0.5": (LORA, 0.5),
    "lora, weight by image": (LORA, (1.0, 0.5)),
    "lora, schedule": (LORA, schedule("0-1: 1")),
    "lora, weight 0": (LORA, 0.0),
    "skip": (SKIP, 1.0),
    "skip, mask": (SKIP, MASK),
    "skip, weight 0": (SKIP, 0.0),
    "res (default)": (ResConfig(width=RANK), 1.0),
    "res, mask": (ResConfig(width=RANK), MASK),
    "bypass (default)": (BypassConfig(), 1.0),
}


class Operations(TorchDispatchMode):
    """Counts the operations of torch, each of which is at least one kernel or view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run an operation."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_calls(forward: Callable[[], object]) -> int:
    """Return the number of calls of Python and C functions in a forward pass."""
    calls = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        forward()
    finally:
        sys.setprofile(None)
    return calls


@contextmanager
def variant(unet: nn.Module, config: PartConfig, weight: Weight) -> Iterator[nn.Module]:
    """Context manager with a tuner attached; yields the U-Net."""
    with attached(unet, [acting_tuner(unet, config, 0)], [weight]):
        manager = TunerManager.of(unet)
        assert manager is not None
        manager.layout = Layout(2, False, 2)
        yield unet


def measure(ways: dict[str, Callable[[], AbstractContextManager[nn.Module]]], rounds: int) -> list[dict[str, Any]]:
    """Return times, calls and operations of a forward pass of each variant, all of which run in turn."""
    x, step, text = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 7, 32)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rows: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for _ in range(rounds):
            for name, way in ways.items():
                with way() as unet:
                    forward = partial(unet, x, step, text, return_dict=False)
                    forward()
                    for _ in range(3):
                        start = time.process_time()
                        forward()
                        seconds[name].append(time.process_time() - start)
                    if name not in rows:
                        with Operations() as operations:
                            forward()
                        rows[name] = {"what": name, "calls": count_calls(forward), "operations": operations.count}
    return [{**rows[name], "ms": 1e3 * min(times)} for name, times in seconds.items()]


def main() -> None:
    """Run the benchmark, print the table and write it with the command, machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each variant, of three passes (default: 15)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(**SMALL).eval().requires_grad_(False)
    peer = copy.deepcopy(unet)
    peer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    ways: dict[str, Callable[[], AbstractContextManager[nn.Module]]] = {
        "no tuner": lambda: nullcontext(unet),
        "LoRA of PEFT": lambda: nullcontext(peer),
    }
    ways |= {name: partial(variant, unet, *settings) for name, settings in VARIANTS.items()}
    rows = measure(ways, arguments.rounds)
    first = rows[0]
    table = [
        "| what | processor time, ms | ratio | function calls | ratio | operations |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        times, calls = row["ms"] / first["ms"], row["calls"] / first["calls"]
        table.append(
            f"| {row['what']} | {row['ms']:.1f} | {times:.2f} | {row['calls']} | {calls:.2f} | {row['operations']} |"
        )
    publish(
        "benchmarks.host_time", rows, table, f"least of {3 * arguments.rounds} alternating passes", arguments.output
    )


if __name__ == "__main__":
    main()
