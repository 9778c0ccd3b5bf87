"""Generate one prompt in many styles as one batch: every row has its own tuner, or its own mix of them.

python examples/many_styles_in_one_batch.py                # the bundled base, two minutes on a CPU, then seconds
python examples/many_styles_in_one_batch.py --base BASE --tuners A.safetensors B.safetensors --prompt "a fox"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from demo_tuners import demo_tuners

from restune_diffusion.cli.guard import run_guarded
from restune_diffusion.imaging.contact_sheet import labelled_grid
from restune_diffusion.pipelines.load_base import load_placed
from restune_diffusion.storage.base_files.location import BUNDLED_BASE


def main() -> None:
    """Load all tuners, and generate all rows in one call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(BUNDLED_BASE))
    parser.add_argument("--tuners", nargs="+", type=Path, help="files; by default two for the bundled base")
    parser.add_argument("--prompt", default="red heart")
    parser.add_argument("--output", type=Path, default=Path("outputs/many-styles"))
    parser.add_argument("--steps", type=int, default=150, help="training steps of the default tuners")
    parser.add_argument("--inference-steps", type=int, default=20)
    options = parser.parse_args()

    files = options.tuners or demo_tuners(options.output, options.steps)
    pipe = load_placed(options.base, "auto", "auto")
    for file in files:
        pipe.load_tuner_weights(file)
    names = [file.stem for file in files]
    # One entry per image: the base, each tuner, each at half its weight, and all of them mixed.
    styles: dict[str, dict[str, float] | None] = {"base": None} | {name: {name: 1.0} for name in names}
    styles |= {f"{name} at 0.5": {name: 0.5} for name in names}
    styles |= {"mixed": {name: 1 / len(names) for name in names}}

    images = pipe(
        [options.prompt] * len(styles),
        tuners=list(styles.values()),
        num_inference_steps=options.inference_steps,
        guidance_scale=4.0,
        generator=[torch.Generator("cpu").manual_seed(0) for _ in styles],
    ).images

    options.output.mkdir(parents=True, exist_ok=True)
    for style, image in zip(styles, images, strict=True):
        image.save(options.output / f"{style}.png")
    labelled_grid([images], [options.prompt], list(styles), cell=192).save(options.output / "grid.png")
    print(f"{options.output / 'grid.png'}: {len(styles)} styles in one batch, on one base")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
