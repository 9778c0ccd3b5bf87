"""Draw prompts with any U-Net that fits the base's pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class Artist:
    """The base's pipeline with fixed sampling settings: the same prompt and seed start from the same noise."""

    pipeline: Any
    steps: int = 20
    guidance: float = 4.0
    batch: int = 25

    def draw(self, prompts: Sequence[str], *, seed: int, unet: Any = None) -> torch.Tensor:
        """Draw one picture per prompt.

        Args:
            prompts: what to draw.
            seed: picture `i` starts from the noise of seed `10_000 * seed + i`.
            unet: drawn with this instead of the base's own.

        Returns:
            N x 3 x 64 x 64 (the base's size), float32 in [0, 1].
        """
        models = {**self.pipeline.components, "unet": self.pipeline.unet if unet is None else unet}
        sampler = StableDiffusionPipeline(**models, requires_safety_checker=False)
        sampler.set_progress_bar_config(disable=True)
        parts = []
        for start in range(0, len(prompts), self.batch):
            chosen = list(prompts[start : start + self.batch])
            numbers = range(10_000 * seed + start, 10_000 * seed + start + len(chosen))
            parts.append(
                sampler(
                    chosen,
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance,
                    generator=[torch.Generator().manual_seed(number) for number in numbers],
                    output_type="pt",
                ).images
            )
        return torch.cat(parts).float()
