"""Options shared by the commands that generate images: base, prompts, tuners and sampler settings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .mix import MixOptions


class SamplingOptions(MixOptions):
    """Base, prompts, tuners and sampler settings of generated images."""

    base: str
    """Stable Diffusion checkpoint in diffusers' layout: a directory, or a hub repository id."""
    prompt: tuple[str, ...] = Field(min_length=1)
    """One or more prompts."""
    negative_prompt: str | None = None
    """Negative prompt: content to avoid."""
    seed: int = 0
    """Seed of the first image of every prompt; image i uses seed + i."""
    images: int = Field(default=1, gt=0)
    """Images per prompt."""
    steps: int = Field(default=50, gt=0)
    """Denoising steps."""
    guidance: float = Field(default=7.5, ge=0)
    """Classifier-free guidance scale."""
    width: int | None = Field(default=None, gt=0)
    """Width in pixels; the base's native size if not given."""
    height: int | None = Field(default=None, gt=0)
    """Height in pixels; the base's native size if not given."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Compute device; `auto` uses a GPU if there is one."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision; `auto` is fp16 on a GPU and fp32 on the CPU."""

    @property
    def seeds(self) -> range:
        """Seeds of the images of each prompt."""
        return range(self.seed, self.seed + self.images)

    def load(self) -> Any:
        """Return the pipeline with the tuners loaded and their weights set."""
        from .mix import load_tuners
        from .placement import load_placed

        # Options are validated before a large checkpoint is loaded.
        weights = self.weights()
        pipeline = load_placed(self.base, self.device, self.dtype)
        load_tuners(pipeline, weights)
        return pipeline

    def arguments(self, seed: int) -> dict[str, Any]:
        """Return the pipeline's arguments for one image, except the prompt."""
        import torch

        return {
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "width": self.width,
            "height": self.height,
            # A CPU generator gives the same noise for a seed on every machine.
            "generator": torch.Generator("cpu").manual_seed(seed),
        }
