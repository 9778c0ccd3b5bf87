"""The stage in which a trained U-Net draws the last steps of known pictures, for the decoder to learn its errors."""

from __future__ import annotations

import argparse

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from research.restune_tiny.parts.examples import Examples
from research.restune_tiny.parts.folders import write_tensors
from research.restune_tiny.parts.icons import Icons

REDRAWN = "redrawn.safetensors"
LAST_STEPS = (1, 2, 3, 4)
"""How many of ten steps are drawn anew. More, and it becomes another picture."""
BATCH = 48


class Redrawn:
    """Latents as a U-Net draws them, and the pictures that they should have been."""

    def __init__(self, settings: argparse.Namespace, icons: Icons) -> None:
        stored = load_file(settings.work / REDRAWN)
        self.latents, self.picks, self.variants = stored["latents"], stored["icons"], stored["variants"]
        self.icons, self.seed = icons, int(stored["seed"])

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Scaled latents, N x 16 x 8 x 8, and pictures, N x 3 x 64 x 64 in -1..1, drawn by torch's generator."""
        picks = torch.randint(len(self.latents), (size,)).tolist()
        return self.latents[picks].float(), torch.stack([self.picture(pick) for pick in picks])

    def picture(self, pick: int) -> Tensor:
        """The picture that was redrawn: its variants are those that were encoded."""
        pictures, _ = self.icons.variants(int(self.picks[pick]), self.seed)
        return pictures[int(self.variants[pick])]


@torch.no_grad()
def redraw(
    pipeline: StableDiffusionPipeline, clean: Tensor, prompts: list[str], steps: int, guidance: float
) -> Tensor:
    """Noise scaled latents, N x 16 x 8 x 8, and draw the last of ten steps; the U-Net sets the dtype of the work."""
    scheduler, unet, count = pipeline.scheduler, pipeline.unet, len(clean)
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps[-steps - 1 :]
    texts = ["" for _ in prompts] + prompts
    states = pipeline.encode_prompt(texts, "cpu", 1, False)[0].to(unet.dtype)
    noisy = scheduler.add_noise(clean, torch.randn_like(clean), timesteps[:1].expand(count))
    for timestep in timesteps:
        given = torch.cat([noisy, noisy]).to(unet.dtype, memory_format=torch.channels_last)
        free, named = unet(given, timestep, states).sample.float().chunk(2)
        noisy = scheduler.step(free + guidance * (named - free), timestep, noisy).prev_sample
    return noisy


def redraw_latents(arguments: argparse.Namespace) -> None:
    """Redraw pictures in random order and write what became of them."""
    examples = Examples(arguments)
    if examples.seed is None:
        raise SystemExit(
            f"The latents in {arguments.work} do not say how they were made; run the stage latents again."
        )
    records = examples.captions.records
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.start)
    pipeline.unet.to(torch.bfloat16, memory_format=torch.channels_last)
    torch.manual_seed(arguments.seed)
    order = torch.randperm(len(records))
    every = order.repeat(-(-arguments.count // len(order)))[: arguments.count]
    latents, shapes = [], []
    for turn, picks in enumerate(every.split(BATCH)):
        kinds = torch.multinomial(examples.variant_chances, len(picks), replacement=True)
        prompts = []
        for pick, shade in zip(picks.tolist(), examples.colours[picks, kinds].tolist(), strict=True):
            name, style = records[pick]["captions"][0], records[pick]["style"]
            colour = examples.palette[shade]
            prompts.append(f"{name}, {style}" if colour == "white" else f"{name} on a {colour} background, {style}")
        clean = examples.latents[picks, kinds].float()
        steps = LAST_STEPS[turn % len(LAST_STEPS)]
        latents.append(redraw(pipeline, clean, prompts, steps, arguments.guidance).to(torch.bfloat16))
        shapes.append(kinds)
        print(f"redrawn {min((turn + 1) * BATCH, len(every))} of {len(every)}", flush=True)
    stored = {"latents": torch.cat(latents), "icons": every, "variants": torch.cat(shapes), "seed": examples.seed}
    write_tensors(stored, arguments.work / REDRAWN)
