"""Base, tuner files and requests that all contestants share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from restune_diffusion import ResConfig, RestuneStableDiffusionPipeline, SkipConfig, Tuner, save_tuner
from restune_diffusion.cli.run_demo import BASE
from restune_diffusion.conversion.formats import export_tuner
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.serving import ImageRequest

GUIDANCE = 4.0
_SUBJECTS = ("a red apple", "a boat at sea", "a small house", "a green tree", "a blue fish", "a yellow star")
_LORA = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=8)


@dataclass(frozen=True)
class Workload:
    """Queue of requests over tuners of one base.

    Args:
        pipeline: the pipeline of the base.
        folder: folder with `lora-<number>` in diffusers' layout and `skip-<number>`.
        size: width and height of the images in pixels.
        tuners: number of tuners of each family.
        requests: number of requests.
        steps: numbers of steps among which the requests vary.
    """

    pipeline: Any
    folder: Path
    size: int
    tuners: int
    requests: int
    steps: tuple[int, ...]

    def queue(self, family: str, steps: Sequence[int] | None = None) -> list[ImageRequest]:
        """Return the requests, in an order that mixes the tuners."""
        chance = random.Random(0)
        numbers = [number % self.tuners for number in range(self.requests)]
        chance.shuffle(numbers)
        return [
            ImageRequest(
                _SUBJECTS[place % len(_SUBJECTS)],
                seed=place,
                width=self.size,
                height=self.size,
                steps=chance.choice(list(steps or self.steps[:1])),
                guidance=GUIDANCE,
                tuners=((f"{family}-{number}", 1.0),),
            )
            for place, number in enumerate(numbers)
        ]

    def file(self, name: str) -> Path:
        """Return the path of a tuner's file."""
        return self.folder / f"{name}.safetensors"


def make_workload(base: str, folder: Path, *, tuners: int, requests: int, steps: int) -> Workload:
    """Load a base, and write the tuner files.

    Args:
        base: `restune-tiny`, or `sd15` for random weights of that size with small latents.
        folder: an empty folder.
        tuners: number of tuners of each family.
        requests: number of requests.
        steps: number of steps of a request.
    """
    pipeline = load_base(str(BASE), torch.float32) if base == "restune-tiny" else _sd15()
    pipeline.set_progress_bar_config(disable=True)
    for number in range(tuners):
        for family, config in (("lora", _LORA), ("skip", SkipConfig())):
            tuner = Tuner.for_base(pipeline.unet, config)
            generator = torch.Generator().manual_seed(number)
            for parameter in tuner.parameters():
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
            path = folder / f"{family}-{number}.safetensors"
            if family == "lora":
                export_tuner(tuner, path, "diffusers")
            else:
                save_tuner(tuner, path)
    return Workload(pipeline, folder, 64, tuners, requests, (steps, max(1, steps // 2), steps * 3 // 2))


def _sd15() -> Any:
    """Return a pipeline of the size of Stable Diffusion 1.5 with random weights, and the tokenizer of restune-tiny."""
    torch.manual_seed(0)
    tiny = load_base(str(BASE), torch.float32)
    unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=8)
    text = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12, num_attention_heads=12, hidden_size=768,
                                        intermediate_size=3072, projection_dim=768))  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    return RestuneStableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tiny.tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler.from_config(tiny.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
