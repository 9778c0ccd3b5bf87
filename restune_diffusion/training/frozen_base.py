"""Check, freeze and move the base of a training run."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ..hooks.manager import TunerManager
from ..pipelines.load_base import is_inpainting
from ..utils.errors import TrainingError

_T = TypeVar("_T")


def check_trainable(pipeline: Any) -> None:
    """Check that tuners can be trained on a pipeline's U-Net.

    Raises:
        TrainingError: if the U-Net is for neither text-to-image nor inpainting, or has tuners attached.
    """
    latent_channels = pipeline.vae.config.latent_channels
    if pipeline.unet.config.in_channels != latent_channels and not is_inpainting(pipeline):
        raise TrainingError(
            f"The base's U-Net takes {pipeline.unet.config.in_channels} channels, but its latents have "
            f"{latent_channels}; train on a text-to-image checkpoint, which takes {latent_channels}, or an inpainting "
            f"checkpoint, which takes {2 * latent_channels + 1}. Its tuners fit this base too."
        )
    manager = TunerManager.of(pipeline.unet)
    if manager is not None:
        raise TrainingError(
            f"The base has the tuners {', '.join(manager.names)} attached; detach them before training."
        )


@contextmanager
def frozen(pipeline: Any) -> Iterator[None]:
    """Context manager that freezes all parameters of a pipeline and puts its modules in eval mode."""
    modules = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    trainable = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    training = [child for module in modules for child in module.modules() if child.training]
    for parameter in trainable:
        parameter.requires_grad_(False)
    for child in training:
        child.training = False
    # Weak references, so that a model that is removed from the pipeline inside the context is freed.
    parameters, children = [weakref.ref(each) for each in trainable], [weakref.ref(each) for each in training]
    del modules, trainable, training
    try:
        yield
    finally:
        for parameter in _alive(parameters):
            parameter.requires_grad_(True)
        for child in _alive(children):
            child.training = True


def _alive(references: Iterable[weakref.ref[_T]]) -> list[_T]:
    return [each for reference in references if (each := reference()) is not None]


def move_encoders(pipeline: Any, device: torch.device, keep: Iterable[str] = ()) -> None:
    """Move all models except the denoiser; training needs them only to fill the cache and to generate samples.

    Args:
        pipeline: the pipeline.
        device: target device.
        keep: names of models that are not moved, because every training step needs them.
    """
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name not in ("unet", *keep):
            component.to(device)
