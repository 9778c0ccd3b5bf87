"""Train a tuner on a folder of images; generate with the base and with the tuner.

    python examples/train_and_generate.py                      # the bundled base, about a minute on a CPU
    python examples/train_and_generate.py --base BASE --data IMAGES --prompt "a fox, my style"

BASE is a folder in diffusers' layout, a safetensors file or an id on the Hub. IMAGES has a caption for each image, in
a `.txt` file beside it or in `metadata.jsonl`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from restune_diffusion.cli.guard import run_guarded
from restune_diffusion.imaging.contact_sheet import labelled_grid
from restune_diffusion.pipelines.load_base import load_placed
from restune_diffusion.storage.base_files.location import BUNDLED_BASE
from restune_diffusion.training import TrainConfig, train


def main() -> None:
    """Train, generate before and after, and write a grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(BUNDLED_BASE))
    parser.add_argument("--data", type=Path, default=BUNDLED_BASE.parent / "demo")
    parser.add_argument("--prompt", nargs="+", default=["red heart, ink style", "dog face, ink style"])
    parser.add_argument("--output", type=Path, default=Path("outputs/train-and-generate"))
    parser.add_argument("--steps", type=int, help="training steps; by default those of the preset `style`")
    parser.add_argument("--inference-steps", type=int, default=20)
    options = parser.parse_args()

    bundled = options.base == str(BUNDLED_BASE)
    settings: dict[str, Any] = {"steps": 150, "learning_rate": 2e-3} if bundled else {}
    if options.steps is not None:
        settings["steps"] = options.steps
    precision = "fp16" if torch.cuda.is_available() else "no"
    paths = {"base": options.base, "data": options.data, "output": options.output}
    result = train(TrainConfig(**paths, preset="style", mixed_precision=precision, log_with="none", **settings))

    pipe = load_placed(options.base, "auto", "auto")
    call = {"prompt": options.prompt, "num_inference_steps": options.inference_steps, "guidance_scale": 4.0}
    base = pipe(**call, generator=torch.Generator("cpu").manual_seed(0)).images
    pipe.load_tuner_weights(result.path)
    tuned = pipe(**call, generator=torch.Generator("cpu").manual_seed(0)).images
    pipe.unload_tuner_weights()

    rows = list(zip(base, tuned, strict=True))
    grid = options.output / "grid.png"
    labelled_grid(rows, options.prompt, ["base", "tuner"], cell=256).save(grid)
    print(f"{grid}: the same prompts and seed, without and with {result.path}")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
