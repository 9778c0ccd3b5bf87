"""Count the training memory of each preset, on the structures of SD 1.5, SD 2.1 and SDXL.

    python benchmarks/preset_memory.py --output benchmarks/results/preset_memory

The result is a count, not a measurement: weights of the U-Net (and of trained text encoders), sixteen bytes per tuner
parameter (weight, gradient, two moments), and the tensors that autograd saves in one forward pass, each once. Tensors
have shapes but no values (`FakeTensorMode`), so the count runs on any machine. It excludes the workspace of kernels,
the CUDA context, the activations of trained text encoders, and the VAE, which is on the device only before the first
step and for samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.backward_memory import SD15
from restune_diffusion import Tuner, attach
from restune_diffusion.pipelines.load_base import PRECISIONS
from restune_diffusion.training import TrainConfig
from restune_diffusion.training.advice.memory_estimate import build_unet, drop_values, kept_bytes
from restune_diffusion.training.build import tuner_autocast
from restune_diffusion.training.config.presets import PRESETS

_SD21 = {**SD15, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
_SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# U-Net, side of the images, parameters of the text encoders: CLIP ViT-L; OpenCLIP ViT-H without its last layer; ViT-L
# and OpenCLIP ViT-bigG.
BASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "SD 1.5": (SD15, 512, 123_060_480),
    "SD 2.1": (_SD21, 768, 340_387_840),
    "SDXL": (_SDXL, 1024, 123_060_480 + 694_659_840),
}


def count(base: str, preset: Any) -> dict[str, Any]:
    """Return the training memory of a preset on a base in bytes, by purpose."""
    structure, side, text_parameters = BASES[base]
    config = TrainConfig(base=base, data=Path("data"), output=Path("out"), preset=preset)
    dtype = PRECISIONS[config.memory.mixed_precision]
    unet, mode = build_unet(structure, dtype)
    tuner = Tuner.for_base(unet, *[part for part in config.parts if part.part != "text"])
    tuner.autocast = tuner_autocast(config.memory.mixed_precision, unet)
    with mode:
        drop_values(tuner)
    with attach(unet, tuner), mode:
        kept = kept_bytes(unet, tuner, config, side)
    weights = sum(parameter.numel() for parameter in unet.parameters()) * dtype.itemsize
    trained = tuner.num_parameters() * 16
    text = text_parameters * dtype.itemsize if "text" in config.kinds else 0
    return {
        "base": base, "side": side, "preset": preset, "batch": config.batch_size,
        "precision": {"no": "fp32"}.get(config.memory.mixed_precision, config.memory.mixed_precision),
        "weights": weights + text, "tuner": trained, "kept": kept, "sum": weights + text + trained + kept,
    }  # fmt: skip


def main() -> None:
    """Run the count, print the table and write it with the command and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    rows = [count(base, preset) for preset in PRESETS for base in BASES]
    lines = [
        "| preset | base | image | batch | precision | frozen weights, GiB | tuner and optimizer | kept for backward "
        "| sum |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(f"{row[name] / 2**30:.2f}" for name in ("weights", "tuner", "kept", "sum"))
        lines.append(
            f"| {row['preset']} | {row['base']} | {row['side']} px | {row['batch']} | {row['precision']} | {figures} |"
        )
    table = "\n".join(lines)
    print(table)
    if arguments.output:
        versions = {name: version(name) for name in ("torch", "diffusers")}
        facts = {"command": " ".join(["python", *sys.argv]), "versions": versions, "rows": rows}
        arguments.output.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
        what = "Counted, not measured; " + ", ".join(f"{name} {number}" for name, number in versions.items())
        arguments.output.with_suffix(".md").write_text(f"{table}\n\n{what}.\n")


if __name__ == "__main__":
    main()
