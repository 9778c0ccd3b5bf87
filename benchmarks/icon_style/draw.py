"""Draw prompts with any U-Net that fits the base's pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn


@contextmanager
def guided_from(unet: nn.Module, states: Tensor, strength: float) -> Iterator[None]:
    """Push what a U-Net predicts for prompts further from what it predicts for others (arXiv 2206.01714).

    Args:
        unet: called by a pipeline with classifier-free guidance, on 2N latents.
        states: N x tokens x width, the other prompts' states.
        strength: how many times the difference is added before the pipeline's own guidance.
    """

    def push(module: nn.Module, args: Any, kwargs: Any, output: tuple[Tensor]) -> tuple[Tensor]:
        noisy, timestep = args
        free, named = output[0].chunk(2)
        # `forward` itself, past the hooks: the call must not come back here.
        other = module.forward(noisy.chunk(2)[1], timestep, encoder_hidden_states=states, return_dict=False)[0]
        return (torch.cat([free, named + strength * (named - other)]),)

    hook = unet.register_forward_hook(push, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Artist:
    """The base's pipeline with fixed sampling settings: the same prompt and seed start from the same noise.

    With `away` above zero every step takes a third pass: `guidance` times the difference from the empty prompt and
    `away` times the difference from the prompt that `draw` is told to draw away from. `rescale` is diffusers'
    `guidance_rescale` (arXiv 2305.08891, section 3.4): how much of guidance's gain in contrast is taken back.

    Raises:
        ValueError: `away` without classifier-free guidance, on whose passes it is built.
    """

    pipeline: Any
    steps: int = 20
    guidance: float = 4.0
    batch: int = 25
    away: float = 0.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if self.away and self.guidance <= 1:
            raise ValueError(f"Guidance away from a prompt needs a guidance scale above 1, not {self.guidance:g}.")

    def draw(
        self, prompts: Sequence[str], *, seed: int, unet: Any = None, others: Sequence[str] | None = None
    ) -> torch.Tensor:
        """Draw one picture per prompt.

        Args:
            prompts: what to draw.
            seed: picture `i` starts from the noise of seed `10_000 * seed + i`.
            unet: drawn with this instead of the base's own.
            others: for each prompt the one to draw away from, where `away` is above zero.

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
            with ExitStack() as stack:
                if others is not None and self.away:
                    bare = list(others[start : start + self.batch])
                    states, _ = sampler.encode_prompt(bare, sampler.device, 1, False)
                    stack.enter_context(guided_from(models["unet"], states, self.away / self.guidance))
                parts.append(
                    sampler(
                        chosen,
                        num_inference_steps=self.steps,
                        guidance_scale=self.guidance,
                        guidance_rescale=self.rescale,
                        generator=[torch.Generator().manual_seed(number) for number in numbers],
                        output_type="pt",
                    ).images
                )
        return torch.cat(parts).float()
