"""Text conditioning of the denoiser, computed once per caption by the pipeline's `encode_prompt`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...data.image_files import SizeConditioning
from ...utils.display import printable
from ...utils.errors import TrainingError
from ..transfers.to_device import to_device


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings of one caption, `(tokens, channels)`; `pooled` is SDXL's pooled embedding, `(channels,)`."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None


def encode_caption(pipeline: Any, caption: str) -> Conditioning:
    """Encode a caption as the pipeline does for generation.

    Raises:
        TrainingError: if the text encoder gives NaN or infinite embeddings.
    """
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            prompt=caption,
            device=pipeline.unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    # SD 1.x and 2.x return (positive, negative), SDXL (positive, negative, pooled, negative pooled).
    pooled = encoded[2][0].cpu() if len(encoded) == 4 else None
    states = encoded[0][0].cpu()
    if not (states.isfinite().all() and (pooled is None or pooled.isfinite().all())):
        raise TrainingError(
            f"The text encoder of the base gives NaN or infinite embeddings for the caption {printable(caption)!r}; "
            f"its weights are damaged. Use another copy of the base."
        )
    return Conditioning(states, pooled)


class LiveEncoder:
    """Encoder of a batch's captions in every step, with gradient, for a tuner on the text encoders.

    Args:
        pipeline: a pipeline with `RestuneLoaderMixin` and the tuner attached to its base.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt", False))

    def __call__(self, captions: Sequence[str | None]) -> list[Conditioning]:
        """Return the text embeddings of captions, on the device; None is the unconditional guidance branch."""
        encoded = self._pipeline.encode_prompt(
            prompt=[caption or "" for caption in captions],
            device=self._pipeline.unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        pooled = encoded[2] if len(encoded) == 4 else [None] * len(captions)
        return [
            # Multiply by zero, so that a batch has a gradient even if every caption is dropped.
            Conditioning(states * 0, each * 0)
            if caption is None and self._zeros and each is not None
            else Conditioning(states, each)
            for caption, states, each in zip(captions, encoded[0], pooled, strict=True)
        ]


def encode_empty_caption(pipeline: Any) -> Conditioning:
    """Encode the empty caption, as the unconditional guidance branch uses it."""
    empty = encode_caption(pipeline, "")
    if empty.pooled is not None and pipeline.config.get("force_zeros_for_empty_prompt", False):
        return Conditioning(torch.zeros_like(empty.states), torch.zeros_like(empty.pooled))
    return empty


def denoiser_inputs(
    conditionings: Sequence[Conditioning],
    size_conditionings: Sequence[SizeConditioning],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Stack the conditionings of a batch into the keyword arguments of `UNet2DConditionModel`."""
    states = to_device(torch.stack([conditioning.states for conditioning in conditionings]), device, dtype)
    inputs: dict[str, Any] = {"encoder_hidden_states": states}
    pooled = [conditioning.pooled for conditioning in conditionings if conditioning.pooled is not None]
    if pooled:
        sizes = [
            [*size_conditioning.original, *size_conditioning.corner, *size_conditioning.size]
            for size_conditioning in size_conditionings
        ]
        inputs["added_cond_kwargs"] = {
            "text_embeds": to_device(torch.stack(pooled), device, dtype),
            "time_ids": to_device(torch.tensor(sizes, dtype=dtype), device),
        }
    return inputs
