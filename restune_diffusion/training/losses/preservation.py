"""Losses that preserve a subject's class while the subject is learned.

`PriorPreservation` is DreamBooth's (arXiv 2208.12242, section 3.3): training includes images of the class, generated
by the base. `OutputPreservation` needs no images: its target is the base's prediction for the class prompt, with the
tuner disabled. Both are a plain mean squared error, as in diffusers' `train_dreambooth.py`. They do not use the
timestep weights of the images' own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss

from ...data.training_images import load_samples
from ...pipelines.load_base import is_inpainting
from ..config.train_config import TrainConfig
from ..latents.batches import Batch, Batches
from ..latents.cache import Cache, build_cache
from ..latents.text_conditioning import Conditioning, encode_caption
from ..state import Preservation, TrainState
from ..transfers.to_device import to_device
from .class_images import class_examples
from .prediction import predict, tuners_disabled


class PriorPreservation(Preservation):
    """Loss on class images, as many as training images in each batch.

    Args:
        cache: the encoded class images.
        batches: batches of the class images.
    """

    def __init__(self, cache: Cache, batches: Batches) -> None:
        self._cache = cache
        self._batches = batches

    @property
    def identity(self) -> str:
        """Hash of the class images and their captions."""
        return self._cache.data_hash

    def describe(self) -> str:
        """Return a description with the number of class images."""
        return f"{len(self._cache)} class images"

    def loss(self, run: TrainState, batch: Batch, number: int) -> torch.Tensor:
        """Return the mean squared error on the batch of class images with this number."""
        images = self._batches[number]
        target = run.objective.target(images.latents, images.noise, images.timesteps)
        return mse_loss(predict(run, images).float(), target.float())


class OutputPreservation(Preservation):
    """Loss between the predictions for the class prompt with the tuner and without, on the images' noisy latents.

    Args:
        prompt: the class prompt.
        states: its text embeddings from the base's text encoders.
        encode: encodes captions with the tuner, if the tuner changes the text encoders.
    """

    def __init__(
        self,
        prompt: str,
        states: Conditioning,
        encode: Callable[[Sequence[str | None]], Sequence[Conditioning]] | None = None,
    ) -> None:
        self._prompt = prompt
        self._states = states
        self._encode = encode

    @property
    def identity(self) -> str:
        """Class prompt."""
        return self._prompt

    def describe(self) -> str:
        """Describe what is preserved."""
        return f"the base's predictions for {self._prompt!r}"

    def loss(self, run: TrainState, batch: Batch, number: int) -> torch.Tensor:
        """Return the mean squared error against the base's prediction; exactly 0 for a tuner that does nothing."""
        with tuners_disabled(run.pipeline.unet):
            target = predict(run, _with_text(batch, self._states))
        # Encode the prompt as a batch of 1, like the base did: larger batches may differ in the last digits.
        states = self._states if self._encode is None else self._encode([self._prompt])[0]
        return mse_loss(predict(run, _with_text(batch, states)).float(), target.float())


def encode_class(
    config: TrainConfig, accelerator: Accelerator, pipeline: Any, resolution: int, *, verbose: bool = False
) -> Cache | Conditioning | None:
    """Encode the class images or class prompt for `make_preservation`, before a tuner is attached to the base.

    Args:
        config: the settings.
        accelerator: accelerator of the run.
        pipeline: the base.
        resolution: side of the training images in pixels.
        verbose: whether to show a progress bar of generated class images.

    Returns:
        The cache of class images for prior preservation, the text embeddings of the class prompt for output
        preservation, or None for no preservation.

    Raises:
        DataError: if the class images cannot be used.
    """
    if config.preservation.method == "prior":
        examples = class_examples(config, accelerator, pipeline, resolution, verbose=verbose)
        return build_cache(pipeline, load_samples(examples, resolution), is_inpainting(pipeline))
    if config.preservation.method == "output" and config.preservation.class_prompt is not None:
        return encode_caption(pipeline, config.preservation.class_prompt)
    return None


def make_preservation(
    prompt: str | None,
    encoded: Cache | Conditioning | None,
    batches: Callable[[Cache], Batches],
    encode: Callable[[Sequence[str | None]], Sequence[Conditioning]] | None,
) -> Preservation | None:
    """Return the preservation loss for an encoded class, or None if there is none.

    Args:
        prompt: the class prompt.
        encoded: result of `encode_class`.
        batches: returns the batches of a cache.
        encode: see `OutputPreservation`.
    """
    if isinstance(encoded, Cache):
        return PriorPreservation(encoded, batches(encoded))
    if encoded is not None and prompt is not None:
        return OutputPreservation(prompt, encoded, encode)
    return None


def _with_text(batch: Batch, states: Conditioning) -> Batch:
    """Return a copy of the batch with the same text embeddings in every row."""
    old = batch.inputs["encoder_hidden_states"]
    inputs: dict[str, Any] = {
        **batch.inputs,
        "encoder_hidden_states": _rows(states.states, old),
    }
    if states.pooled is not None:
        added = batch.inputs["added_cond_kwargs"]
        inputs["added_cond_kwargs"] = {**added, "text_embeds": _rows(states.pooled, added["text_embeds"])}
    return replace(batch, inputs=inputs)


def _rows(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return to_device(value, like.device, like.dtype).expand(len(like), *value.shape)
