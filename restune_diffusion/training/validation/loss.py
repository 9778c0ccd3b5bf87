"""Loss of the held-out images at fixed noise and evenly spaced timesteps.

Each image has the same noise, latent, mask of an inpainting base and timesteps in every measurement and in every run,
so losses of two steps or two runs differ by the tuners alone. It is the loss of training, with its masks and timestep
weights, without dropped captions, noise offset and input perturbation, over all timesteps of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...pipelines.load_base import sampling_pipeline
from ...utils.seeds import seeded
from ..latents.batches import Batch, Batches
from ..latents.inpainting import InpaintingInputs
from ..latents.noising import Noising
from ..latents.sampler import Draw
from ..latents.text_conditioning import LiveEncoder
from ..losses.prediction import predict, tuner_attached
from ..state import TrainState
from .held_out import HeldOut

TIMESTEPS = 8
"""Number of timesteps of each image: the midpoints of equal parts of the base's timesteps."""
_SEED = 0


def held_out_batches(run: TrainState, held_out: HeldOut, encoder: Any = None) -> Iterator[Batch]:
    """Yield the batches of a measurement: all images at one timestep after another, in sizes of training batches.

    Args:
        run: state of the run.
        held_out: the held-out images.
        encoder: VAE that encodes the masked images of an inpainting base.
    """
    cache, size = held_out.cache, run.config.batch_size
    shapes: dict[tuple[int, ...], list[int]] = {}
    for number, latent in enumerate(cache.latents):
        shapes.setdefault(tuple(latent.mean.shape), []).append(number)
    encode = LiveEncoder(sampling_pipeline(run.pipeline)) if run.config.learns_from_text else None
    inpainting = InpaintingInputs(encoder, cache.images) if cache.images else None
    for part in range(TIMESTEPS):
        timestep = int((part + 0.5) / TIMESTEPS * run.objective.timesteps)
        batches = Batches(
            cache,
            seed=_SEED,
            size=size,
            timesteps=run.objective.timesteps,
            caption_dropout=0.0,
            device=run.accelerator.device,
            dtype=run.pipeline.unet.dtype,
            noising=Noising(low=timestep, high=timestep + 1),
            encode=encode,
            unmasked_weight=run.config.data.unmasked_weight,
            inpainting=inpainting,
        )
        for images in shapes.values():
            for first in range(0, len(images), size):
                yield batches.of(_draw(held_out, image, part) for image in images[first : first + size])


def _draw(held_out: HeldOut, image: int, part: int) -> Draw:
    purpose = f"held out {held_out.entries[image].digest.hex()}"
    return Draw(image, seeded(_SEED, purpose, part), seeded(_SEED, f"{purpose} view", part))


@torch.no_grad()
def held_out_loss(run: TrainState, held_out: HeldOut, encoder: Any = None) -> float:
    """Return the mean loss of the held-out images with the tuner's released weights, the same on every process.

    Every process must call it: each computes a share of the batches.
    """
    device = run.accelerator.device
    index, count = run.accelerator.process_index, run.accelerator.num_processes
    losses = []
    with run.released_weights(), tuner_attached(run):
        for number, batch in enumerate(held_out_batches(run, held_out, encoder)):
            if number % count == index:
                target = run.objective.target(batch.latents, batch.noise, batch.timesteps)
                losses.append(run.objective.sample_losses(predict(run, batch), target, batch.timesteps, batch.mask))
    own = torch.cat(losses) if losses else torch.zeros(0, device=device)
    sums = own.to(torch.float32 if device.type == "mps" else torch.float64).sum()
    total = run.accelerator.reduce(sums, reduction="sum")
    return float(total) / (TIMESTEPS * len(held_out.entries))
