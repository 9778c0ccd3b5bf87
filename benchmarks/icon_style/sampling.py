"""Generate images with any U-Net that fits the base's pipeline."""

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
    """Context manager that guides a U-Net's prediction away from other prompts (arXiv 2206.01714).

    Args:
        unet: U-Net of a pipeline with classifier-free guidance, called with 2N latents.
        states: text embeddings of the other prompts, N x tokens x width.
        strength: factor on the difference that is added before the pipeline's own guidance.
    """

    def push(module: nn.Module, args: Any, kwargs: Any, output: tuple[Tensor]) -> tuple[Tensor]:
        noisy, timestep = args
        free, named = output[0].chunk(2)
        # `forward` directly, without hooks: calling the module would recurse into this hook.
        other = module.forward(noisy.chunk(2)[1], timestep, encoder_hidden_states=states, return_dict=False)[0]
        return (torch.cat([free, named + strength * (named - other)]),)

    hook = unet.register_forward_hook(push, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class ImageSampler:
    """The base's pipeline with fixed sampling settings: the same prompt and seed start from the same noise.

    With `away` above zero every step runs a third forward pass: the prediction adds `guidance` times the difference
    from the empty prompt and `away` times the difference from the other prompt of `generate`. `rescale` is
    diffusers' `guidance_rescale` (arXiv 2305.08891, section 3.4): the share of the contrast gain to remove.

    Raises:
        ValueError: if `away` is set without classifier-free guidance, which it requires.
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

    def generate(
        self, prompts: Sequence[str], *, seed: int, unet: Any = None, others: Sequence[str] | None = None
    ) -> torch.Tensor:
        """Generate one image per prompt.

        Args:
            prompts: the prompts.
            seed: image `i` starts from the noise of seed `10_000 * seed + i`.
            unet: U-Net to use instead of the base's own.
            others: for each prompt, the prompt to guide away from; used if `away` is above zero.

        Returns:
            N x 3 x 64 x 64 (the base's size), float32 in [0, 1].
        """
        models = {**self.pipeline.components, "unet": self.pipeline.unet if unet is None else unet}
        pipeline = StableDiffusionPipeline(**models, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        parts = []
        for start in range(0, len(prompts), self.batch):
            chosen = list(prompts[start : start + self.batch])
            numbers = range(10_000 * seed + start, 10_000 * seed + start + len(chosen))
            with ExitStack() as stack:
                if others is not None and self.away:
                    bare = list(others[start : start + self.batch])
                    states, _ = pipeline.encode_prompt(bare, pipeline.device, 1, False)
                    stack.enter_context(guided_from(models["unet"], states, self.away / self.guidance))
                parts.append(
                    pipeline(
                        chosen,
                        num_inference_steps=self.steps,
                        guidance_scale=self.guidance,
                        guidance_rescale=self.rescale,
                        generator=[torch.Generator().manual_seed(number) for number in numbers],
                        output_type="pt",
                    ).images
                )
        return torch.cat(parts).float()
