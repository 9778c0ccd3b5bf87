"""Keep what the base knows of a subject's class while the subject is learnt.

`PriorPreservation` is that of DreamBooth (arXiv 2208.12242, section 3.3): pictures of the class, drawn by the base,
are trained beside the subject's. `OutputPreservation` needs no pictures: since a tuner can be switched off, the base's
own prediction for the class prompt is at hand as a target. Both are a plain mean squared error, without the weights by
timestep that the images' own loss may have, as in diffusers' `train_dreambooth.py`.
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
from .class_images import class_examples
from .prediction import predict, tuners_disabled


class PriorPreservation(Preservation):
    """The loss of the same number of class images.

    Args:
        cache: the encoded class images.
        batches: batches drawn from them.
    """

    def __init__(self, cache: Cache, batches: Batches) -> None:
        self._cache = cache
        self._batches = batches

    @property
    def identity(self) -> str:
        """Hash of the class images and their captions."""
        return self._cache.data_hash

    def describe(self) -> str:
        """Say how many class images there are."""
        return f"{len(self._cache)} class images"

    def loss(self, run: TrainState, batch: Batch, number: int) -> torch.Tensor:
        """Return the mean squared error on the class images of the same number."""
        images = self._batches[number]
        target = run.objective.target(images.latents, images.noise, images.timesteps)
        return mse_loss(predict(run, images).float(), target.float())


class OutputPreservation(Preservation):
    """How far the prediction for the class prompt is from the base's, on the noisy latents of the images.

    Args:
        prompt: the class prompt.
        states: what the base's text encoders make of it.
        encode: makes the text states of a list of captions with the tuner, where it acts on the text encoders.
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
        """The class prompt."""
        return self._prompt

    def describe(self) -> str:
        """Say what is kept."""
        return f"the base's predictions for {self._prompt!r}"

    def loss(self, run: TrainState, batch: Batch, number: int) -> torch.Tensor:
        """Return the mean squared error against the base's prediction; exactly zero for a tuner that does nothing."""
        with tuners_disabled(run.pipeline.unet):
            target = predict(run, _asked(batch, self._states))
        # The prompt alone, as the base encoded it: rows of a larger batch may differ from it in the last digits.
        states = self._states if self._encode is None else self._encode([self._prompt])[0]
        return mse_loss(predict(run, _asked(batch, states)).float(), target.float())


def know_class(
    config: TrainConfig, accelerator: Accelerator, pipeline: Any, resolution: int, *, verbose: bool = False
) -> Cache | Conditioning | None:
    """Ask the base, before a tuner is on it, for what `make_preservation` needs to know; None for no preservation.

    Args:
        config: the settings.
        accelerator: says which process this is.
        pipeline: the base.
        resolution: side of the training images in pixels.
        verbose: whether to show how far drawing class images is.

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
    known: Cache | Conditioning | None,
    batches: Callable[[Cache], Batches],
    encode: Callable[[Sequence[str | None]], Sequence[Conditioning]] | None,
) -> Preservation | None:
    """Make what preserves the class from what the base knows of it.

    Args:
        prompt: the class prompt.
        known: encoded class images for prior preservation, the class prompt's text states for output preservation, or
            None for neither.
        batches: draws batches from a cache.
        encode: see `OutputPreservation`.
    """
    if isinstance(known, Cache):
        return PriorPreservation(known, batches(known))
    if known is not None and prompt is not None:
        return OutputPreservation(prompt, known, encode)
    return None


def _asked(batch: Batch, states: Conditioning) -> Batch:
    """Return a batch with the same text states in every row."""
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
    return value.to(like).expand(len(like), *value.shape)
