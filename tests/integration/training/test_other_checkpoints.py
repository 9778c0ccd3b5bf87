"""What was trained on one checkpoint is used on others: those of the same structure take it, and no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel

from restune_diffusion import BaseMismatchError, RestuneStableDiffusionPipeline
from restune_diffusion.training import TrainConfig, train

from ... import tiny_training as tiny


def another_checkpoint(**changes: object) -> RestuneStableDiffusionPipeline:
    """The pipeline of the tests with a U-Net of other weights, and where asked of another structure."""
    pipeline = tiny.sd_pipeline()
    settings = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    torch.manual_seed(5)
    unet = UNet2DConditionModel(**{**settings, **changes}).eval()
    components = {**pipeline.components, "unet": unet}
    pipe = RestuneStableDiffusionPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: RestuneStableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe("a disc", num_inference_steps=2, generator=generator, output_type="np").images)


@pytest.mark.parametrize("kind", ["skip", "bypass", "res"])
def test_a_trained_tuner_acts_on_another_checkpoint_of_the_same_structure(
    config: Callable[..., TrainConfig], kind: str
) -> None:
    file = train(config(tuner=kind, steps=6, learning_rate=1e-2)).path
    pipe = another_checkpoint()
    plain = draw(pipe)
    pipe.load_tuner_weights(file)
    assert (draw(pipe) - plain).abs().max() > 1e-3
    pipe.unload_tuner_weights()
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"layers_per_block": 1}, "layers_per_block = 2, but this base has layers_per_block = 1"),
        ({"cross_attention_dim": 48}, "cross_attention_dim = 32, but this base has cross_attention_dim = 48"),
    ],
)
def test_another_structure_is_refused_naming_the_first_difference(
    config: Callable[..., TrainConfig], changes: dict[str, object], difference: str
) -> None:
    file = train(config(tuner="skip", steps=1)).path
    pipe = another_checkpoint(**changes)
    with pytest.raises(BaseMismatchError, match=difference):
        pipe.load_tuner_weights(file)
    assert pipe.get_list_tuners() == {}
