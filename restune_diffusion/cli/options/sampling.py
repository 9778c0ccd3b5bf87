"""What the commands that draw have in common: base, prompts, tuners and the sampler's settings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .mix import MixOptions


class DrawOptions(MixOptions):
    """Settings of a drawing."""

    base: str
    """Stable Diffusion checkpoint in diffusers' layout: a directory, or the id of a hub repository."""
    prompt: tuple[str, ...] = Field(min_length=1)
    """One or more prompts."""
    negative_prompt: str | None = None
    """What the images should not show."""
    seed: int = 0
    """Seed of the first image of every prompt; further ones count on from there."""
    images: int = Field(default=1, gt=0)
    """Images of each prompt."""
    steps: int = Field(default=50, gt=0)
    """Denoising steps."""
    guidance: float = Field(default=7.5, ge=0)
    """Classifier-free guidance."""
    width: int | None = Field(default=None, gt=0)
    """Width in pixels; the base's own where not given."""
    height: int | None = Field(default=None, gt=0)
    """Height in pixels; the base's own where not given."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; `auto` takes a GPU if there is one."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision; `auto` is fp16 on a GPU and fp32 on the CPU."""

    @property
    def seeds(self) -> range:
        """Seeds of the images of each prompt."""
        return range(self.seed, self.seed + self.images)

    def load(self) -> Any:
        """Return a pipeline with the tuners on."""
        from .mix import load_tuners
        from .placement import load_placed

        # What is wrong with the options is said before a large checkpoint is read.
        weights = self.weights()
        pipeline = load_placed(self.base, self.device, self.dtype)
        load_tuners(pipeline, weights)
        return pipeline

    def arguments(self, seed: int) -> dict[str, Any]:
        """Return the pipeline's arguments for one image but its prompt."""
        import torch

        return {
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "width": self.width,
            "height": self.height,
            # On the CPU, so that a seed means the same image on every machine.
            "generator": torch.Generator("cpu").manual_seed(seed),
        }
