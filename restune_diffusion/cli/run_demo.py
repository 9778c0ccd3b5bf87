"""The demo: train two tuners on the bundled base, and generate samples before and after."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image

from ..imaging.contact_sheet import labelled_grid
from ..pipelines.load_base import load_base
from ..storage.base_files.location import BUNDLED_BASE
from ..training import TrainConfig, train
from ..tuners.configs import ResConfig
from ..utils.atomic_write import atomic_write
from ..utils.errors import RestuneError

_ASSETS = Path(__file__).parents[1] / "assets"
BASE = BUNDLED_BASE
IMAGES = _ASSETS / "demo"
STYLE = "ink style"
"""Name of the new style in the captions of the demo's images."""
SUBJECTS = ("red heart", "cat face", "dog face", "red apple", "automobile", "evergreen tree", "alien", "tulip")
"""Subjects of the grid; none of them is among the training images."""
Family: TypeAlias = Literal["res", "bypass"]
_FAMILIES: tuple[Family, ...] = ("res", "bypass")


def run_demo(output: Path, *, steps: int = 300, seed: int = 0) -> Path:
    """Train a res and a bypass tuner on the bundled images and write a grid: base, res tuner, bypass tuner.

    Args:
        output: folder for the tuners and the grid; created if it does not exist.
        steps: optimizer steps of each tuner.
        seed: seed of the training and of the images.

    Returns:
        Path of the grid.

    Raises:
        RestuneError: if the bundled base is missing.
    """
    started = time.perf_counter()
    if not (BASE / "model_index.json").is_file():
        raise RestuneError(f"The bundled base is missing from {BASE}; install restune-diffusion again.")
    pipeline = load_base(str(BASE), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [f"{subject}, {STYLE}" for subject in SUBJECTS]
    columns = {"base": _generate(pipeline, prompts, seed)}
    for family in _FAMILIES:
        config = _recipe(family, output, steps, seed)
        # The demo never resumes: its folder may have the files of an earlier run, which training would not replace.
        config.file.unlink(missing_ok=True)
        result = train(config, pipeline=pipeline)
        pipeline.load_tuner_weights(result.path)
        columns[f"{family} tuner"] = _generate(pipeline, prompts, seed)
        pipeline.unload_tuner_weights()
        print(f"{result.path}: {result.steps} steps in {result.seconds:.0f} s")
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    grid = labelled_grid(rows, prompts, list(columns), cell=128)
    path = output / "grid.png"
    with atomic_write(path) as file:
        grid.save(file, format="PNG")
    print(f"The same prompts and seeds, before and after: {path} ({time.perf_counter() - started:.0f} s in all)")
    return path


def _recipe(family: Family, output: Path, steps: int, seed: int) -> TrainConfig:
    return TrainConfig(
        base=str(BASE),
        data=IMAGES,
        output=output,
        name=family,
        tuner=family,
        # Gradients stop at the last of four up blocks: deeper tuners memorize a small set of images.
        res=ResConfig(width=32, grad_depth=3) if family == "res" else ResConfig(),
        steps=steps,
        batch_size=8,
        learning_rate=1e-3 if family == "res" else 5e-3,
        lr_scheduler="cosine",
        checkpoint_every=0,
        seed=seed,
        cpu=True,
        log_with="none",
    )


def _generate(pipeline: Any, prompts: list[str], seed: int) -> list[Image.Image]:
    """Generate one image for each prompt, all from the same noise."""
    generators = [torch.Generator("cpu").manual_seed(seed) for _ in prompts]
    images: list[Image.Image] = pipeline(
        prompts, num_inference_steps=20, guidance_scale=4.0, generator=generators
    ).images
    return images
