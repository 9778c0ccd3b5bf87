"""Class images: drawn by the base on demand, kept, and never mixed up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from restune_diffusion import RestuneStableDiffusionPipeline
from restune_diffusion.training import TrainConfig
from restune_diffusion.training.losses import class_images as module
from restune_diffusion.training.losses.class_images import class_examples
from restune_diffusion.utils.errors import DataError

from .... import tiny_training as tiny

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return RestuneStableDiffusionPipeline(**tiny.sd_pipeline().components, requires_safety_checker=False)


@pytest.fixture
def drawn(config: MakeConfig, pipeline: Any, tmp_path: Path) -> Callable[..., list[Path]]:
    """Fills a folder of class images and returns those that a run would use."""

    def fill(**changes: Any) -> list[Path]:
        settings: dict[str, Any] = {
            "preservation": "prior",
            "class_prompt": "a disc",
            "class_data": tmp_path / "class",
            "validation": {"steps": 1, "guidance": 2.0},
            **changes,
        }
        examples = class_examples(config(**settings), Accelerator(cpu=True), pipeline, 16)
        assert {example.caption for example in examples} == {"a disc"}
        return [example.path for example in examples]

    return fill


def test_an_image_depends_on_its_number_and_an_interrupted_drawing_goes_on(
    drawn: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [path.read_bytes() for path in drawn(num_class_images=4, class_data=tmp_path / "whole")]
    assert len(set(whole)) == 4
    draw, numbers = module.Recipe.draw, []

    def dying(recipe: module.Recipe, sampler: Any, number: int) -> Image.Image:
        numbers.append(number)
        if len(numbers) == 3:
            raise KeyboardInterrupt
        return draw(recipe, sampler, number)

    monkeypatch.setattr(module.Recipe, "draw", dying)
    with pytest.raises(KeyboardInterrupt):
        drawn(num_class_images=4)
    half = tmp_path / "class" / ".class-000002.png.x.tmp"
    half.write_bytes(whole[2][:50])
    assert [path.read_bytes() for path in sorted((tmp_path / "class").glob("*.png"))] == whole[:2]
    paths = drawn(num_class_images=4)
    assert numbers == [0, 1, 2, 2, 3], "what was whole is not drawn again"
    assert [path.read_bytes() for path in paths] == whole
    assert drawn(num_class_images=2) == paths[:2]
    assert drawn(num_class_images=4) == paths
    assert len(numbers) == 5


def test_the_folder_keeps_how_its_images_are_drawn(drawn: Callable[..., list[Path]], tmp_path: Path) -> None:
    whole = [path.read_bytes() for path in drawn(num_class_images=3, class_data=tmp_path / "whole")]
    drawn(num_class_images=2)
    more = drawn(num_class_images=3, seed=9, validation={"steps": 2})
    assert [path.read_bytes() for path in more] == whole
    other = drawn(num_class_images=1, seed=9, class_data=tmp_path / "other")
    assert other[0].read_bytes() != whole[0]
    with pytest.raises(DataError, match="were drawn with prompt = a disc, not a ball; give another folder"):
        drawn(num_class_images=3, class_prompt="a ball")
    (tmp_path / "class" / "class-images.json").write_text('{"base": ')
    with pytest.raises(DataError, match="is damaged"):
        drawn(num_class_images=3)


def test_the_image_is_what_the_base_draws(drawn: Callable[..., list[Path]], pipeline: Any) -> None:
    import torch

    from restune_diffusion.utils.seeds import derived_seed

    path = drawn(num_class_images=2)[1]
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(derived_seed(0, "class image", 1))
    image = pipeline("a disc", num_inference_steps=1, guidance_scale=2.0, generator=generator).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(image))


def test_own_images_are_used_as_they_are_and_topped_up_if_asked(
    drawn: Callable[..., list[Path]], tmp_path: Path
) -> None:
    folder = tiny.write_images(tmp_path / "class", ["red", "blue"])
    # A name that drawn images have makes none of it.
    (folder / "red.png").rename(folder / "class-000000.png")
    own = [folder / "blue.png", folder / "class-000000.png"]
    content = [path.read_bytes() for path in own]
    assert drawn() == own
    assert not (folder / "class-images.json").exists()
    assert drawn(num_class_images=1) == own[:1]
    (folder / "class-000000.png").rename(folder / "red.png")
    own = [folder / "blue.png", folder / "red.png"]
    both = drawn(num_class_images=3)
    assert both == [*own, folder / "class-000000.png"]
    assert [path.read_bytes() for path in own] == content
    assert drawn() == own, "what was drawn is not taken for the user's own"


def test_class_images_among_the_training_images_are_refused(
    drawn: Callable[..., list[Path]], images: Path, tmp_path: Path
) -> None:
    for folder in (images / "class", images, images.parent):
        with pytest.raises(DataError, match="would be taken for one another"):
            drawn(class_data=folder)
