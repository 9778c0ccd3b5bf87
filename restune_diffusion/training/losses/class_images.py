"""Pictures of a subject's class: those of the user, or drawn by the base and kept in a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import ValidationError
from tqdm.auto import tqdm

from ...data.example import Example
from ...data.files import list_images
from ...pipelines.load_base import is_inpainting, sampling_pipeline
from ...utils.atomic_write import atomic_write
from ...utils.errors import DataError
from ...utils.seeds import derived_seed
from ...utils.settings import Settings
from ..config.train_config import TrainConfig
from .objective import scheduler_changes

DEFAULT_COUNT = 100
RECIPE_FILE = "class-images.json"
_DRAWN = re.compile(r"class-\d{6}\.png")


class Recipe(Settings):
    """How the class images of a folder are drawn; image n depends on this and n alone."""

    base: str
    prompt: str
    resolution: int
    seed: int
    steps: int
    guidance: float
    prediction_type: str | None = None

    def draw(self, sampler: Any, number: int) -> Image.Image:
        """Draw one class image with a pipeline around the base."""
        seed = derived_seed(self.seed, "class image", number)
        image: Image.Image = sampler(
            self.prompt,
            height=self.resolution,
            width=self.resolution,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        return image


def class_examples(
    config: TrainConfig, accelerator: Accelerator, pipeline: Any, resolution: int, *, verbose: bool = False
) -> list[Example]:
    """Return the class images of a run, all captioned with the class prompt; the base draws those that are missing.

    Every process calls this and draws a share. A file is whole once it has its name, so that a run that was killed
    goes on where it was, and runs may share a folder.

    Args:
        config: the settings.
        accelerator: says which process this is.
        pipeline: the base, without tuners.
        resolution: side of the images to draw, in pixels.
        verbose: whether to show a progress bar.

    Raises:
        DataError: if the folder's images were drawn for something else, or it lies among the training images.
        TunerFileError: if an image cannot be written.
    """
    folder = config.preservation.class_data or config.output / "class-images"
    _check_apart(folder, config.data.folder)
    recipe, kept = _recipe(config, resolution), _kept_recipe(folder)
    if kept is not None:
        _check_same(folder, kept, recipe)
        # Whatever drew the first images draws the rest.
        recipe = kept
    own = _own_images(folder, kept is not None)
    wanted = config.preservation.num_class_images or (len(own) if own else DEFAULT_COUNT)
    numbers = range(max(0, wanted - len(own)))
    if numbers:
        _draw_missing(folder, recipe, numbers, accelerator, pipeline, verbose)
    paths = own[:wanted] + [folder / _name(number) for number in numbers]
    return [Example(path, recipe.prompt) for path in paths]


def _draw_missing(
    folder: Path, recipe: Recipe, numbers: Sequence[int], accelerator: Accelerator, pipeline: Any, verbose: bool
) -> None:
    """Draw this process's share of the images that are not there, and wait for the others'."""
    missing = [number for number in numbers if not (folder / _name(number)).is_file()]
    # All processes must see the same gaps before any of them fills one.
    accelerator.wait_for_everyone()
    if missing and accelerator.is_main_process:
        with atomic_write(folder / RECIPE_FILE) as file:
            file.write(recipe.model_dump_json(indent=2).encode())
    if missing and is_inpainting(pipeline):
        raise DataError(
            f"An inpainting base draws no class images from a prompt alone; put images of the class into {folder}, or "
            f"choose output preservation."
        )
    if missing:
        sampler = sampling_pipeline(pipeline, scheduler_changes(recipe.prediction_type))
        share = missing[accelerator.process_index :: accelerator.num_processes]
        shown = verbose and accelerator.is_main_process
        for number in tqdm(share, desc="class images", unit="image", disable=not shown):
            with atomic_write(folder / _name(number)) as file:
                recipe.draw(sampler, number).save(file, "PNG")
    accelerator.wait_for_everyone()


def _recipe(config: TrainConfig, resolution: int) -> Recipe:
    assert config.preservation.class_prompt is not None
    return Recipe(
        base=config.recorded()["base"],
        prompt=config.preservation.class_prompt,
        resolution=resolution,
        seed=config.seed,
        steps=config.validation.steps,
        guidance=config.validation.guidance,
        prediction_type=config.loss.prediction_type,
    )


def _kept_recipe(folder: Path) -> Recipe | None:
    """Read how the images of a folder were drawn, if they were."""
    path = folder / RECIPE_FILE
    if not path.is_file():
        return None
    try:
        return Recipe.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(
            f"{path} is damaged, so that it is not known how the class images were drawn; give another folder."
        ) from error


def _check_same(folder: Path, kept: Recipe, asked: Recipe) -> None:
    # Images of another seed or of more steps are as good.
    for name in ("base", "prompt", "resolution", "prediction_type"):
        before, now = getattr(kept, name), getattr(asked, name)
        if before != now:
            raise DataError(
                f"The class images in {folder} were drawn with {name} = {before}, not {now}; give another folder "
                f"with --class-data, or delete this one."
            )


def _check_apart(folder: Path, data: Path) -> None:
    one, other = folder.resolve(), data.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise DataError(
            f"The class images in {folder} and the training images in {data} would be taken for one another; "
            f"put them in folders of which none lies in the other."
        )


def _own_images(folder: Path, has_drawn: bool) -> list[Path]:
    """List the images that the user put into the folder."""
    present = list_images(folder) if folder.is_dir() else []
    return [path for path in present if not (has_drawn and path.parent == folder and _DRAWN.fullmatch(path.name))]


def _name(number: int) -> str:
    return f"class-{number:06d}.png"
