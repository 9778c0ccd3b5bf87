"""What the text encoders tell the denoiser, computed once per caption by the pipeline's own code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .pictures import Geometry


@dataclass(frozen=True)
class Conditioning:
    """Text states of one caption, on the CPU; `pooled` is what SDXL adds to the time embedding."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None


def encode_caption(pipeline: Any, caption: str) -> Conditioning:
    """Encode a caption as the pipeline does when it generates."""
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            prompt=caption,
            device=pipeline.unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    # SD 1.x and 2.x return (positive, negative), SDXL (positive, negative, pooled, negative pooled).
    pooled = encoded[2][0].cpu() if len(encoded) == 4 else None
    return Conditioning(encoded[0][0].cpu(), pooled)


def encode_nothing(pipeline: Any) -> Conditioning:
    """Encode the empty caption, as the unconditional half of guidance sees it."""
    empty = encode_caption(pipeline, "")
    if empty.pooled is not None and pipeline.config.get("force_zeros_for_empty_prompt", False):
        return Conditioning(torch.zeros_like(empty.states), torch.zeros_like(empty.pooled))
    return empty


def denoiser_inputs(
    conditionings: Sequence[Conditioning], geometries: Sequence[Geometry], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Stack the conditionings of a batch into the keyword arguments of `UNet2DConditionModel`."""
    states = torch.stack([conditioning.states for conditioning in conditionings]).to(device, dtype)
    inputs: dict[str, Any] = {"encoder_hidden_states": states}
    pooled = [conditioning.pooled for conditioning in conditionings if conditioning.pooled is not None]
    if pooled:
        sizes = [[*geometry.original, *geometry.corner, *geometry.size] for geometry in geometries]
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.stack(pooled).to(device, dtype),
            "time_ids": torch.tensor(sizes, device=device, dtype=dtype),
        }
    return inputs
