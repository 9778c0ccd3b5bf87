"""The memory of a step is known from the configs of a base alone."""

from __future__ import annotations

from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.storage.base_files.location import BUNDLED_BASE
from restune_diffusion.training import TrainConfig
from restune_diffusion.training.advice.memory_estimate import estimate_memory
from restune_diffusion.tuners.tuner import Tuner


def config(**settings):
    return TrainConfig(**{"base": str(BUNDLED_BASE), "data": "data", "output": "out", **settings})


def test_weights_and_tuner_are_those_of_the_loaded_base():
    import torch

    pipeline = load_base(str(BUNDLED_BASE), torch.float32)
    settings = config(preset="subject", text={"tokens": ("<x>",)})
    estimate = estimate_memory(settings)
    count = sum(
        parameter.numel() for part in (pipeline.unet, pipeline.text_encoder) for parameter in part.parameters()
    )
    assert estimate.weights == 4 * count
    tuner = Tuner.for_pipeline(pipeline, settings.skip)
    assert estimate.tuner == 16 * tuner.num_parameters()
    assert estimate.total == estimate.weights + estimate.tuner + estimate.kept


def test_activations_grow_with_batch_and_area_and_a_bypass_keeps_the_least():
    one = estimate_memory(config(tuner="skip"))
    # Some of what is kept does not depend on the batch.
    assert 3 < estimate_memory(config(tuner="skip", batch_size=4)).kept / one.kept <= 4
    assert estimate_memory(config(tuner="skip", resolution=128)).kept > 3.5 * one.kept
    bypass = estimate_memory(config(tuner="bypass", mixed_precision="bf16"))
    assert bypass.kept < one.kept / 10
    assert bypass.weights == one.weights // 2
    assert estimate_memory(config(tuner="control")).kept > one.kept


def test_a_base_that_is_not_on_this_machine_has_no_estimate():
    assert estimate_memory(config(base="nobody/has-this")) is None
