"""LoRA training loop of diffusers' `examples/text_to_image/train_text_to_image_lora.py`.

The script is not part of the wheel, so this module reimplements its procedure: the LoRA layers and their
initialization, the encoding, the random numbers, the loss, and the order of accelerate's calls. It omits the parts
that take no time in a step: arguments, trackers, checkpoints and validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from restune_diffusion.data.example import Example

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
Item = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """Options of the script that affect a step, with the script's defaults."""

    resolution: int
    steps: int
    batch_size: int
    rank: int = 4
    learning_rate: float = 1e-4
    cached: bool = False
    """Encode images and captions before the first step, as our training does; not an option of the script."""
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    cpu: bool = True


class Images(Dataset[Item]):
    """Dataset that reads, resizes, crops and tokenizes an image on every access."""

    def __init__(self, examples: Sequence[Example], tokenizer: Any, resolution: int) -> None:
        self._examples, self._tokenizer, self._resolution = examples, tokenizer, resolution

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Item:
        example = self._examples[index]
        tokens = self._tokenizer(
            example.caption, max_length=self._tokenizer.model_max_length, padding="max_length", truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        return {"pixels": self._pixels(example), "tokens": tokens.input_ids[0]}

    def _pixels(self, example: Example) -> torch.Tensor:
        side = self._resolution
        with Image.open(example.path) as file:
            image = file.convert("RGB")
        scale = side / min(image.size)
        scaled = image.resize([max(side, round(s * scale)) for s in image.size], Image.Resampling.BILINEAR)
        left, top = ((length - side) // 2 for length in scaled.size)
        square = np.asarray(scaled.crop((left, top, left + side, top + side)), dtype=np.float32)
        return torch.from_numpy(square / 127.5 - 1).permute(2, 0, 1)


class Encoded(Dataset[Item]):
    """Cache of the latents and text embeddings of a dataset, computed once."""

    def __init__(self, images: Images, vae: Any, text_encoder: Any) -> None:
        self._items: list[Item] = []
        with torch.no_grad():
            for item in (images[index] for index in range(len(images))):
                posterior = vae.encode(item["pixels"][None].to(vae.device, vae.dtype)).latent_dist
                states = text_encoder(item["tokens"][None].to(text_encoder.device))[0][0]
                encoded = {"mean": posterior.mean[0], "std": posterior.std[0], "states": states}
                self._items.append({name: tensor.cpu() for name, tensor in encoded.items()})

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        return self._items[index]


def train_lora(
    pipeline: Any, examples: Sequence[Example], settings: Settings, on_step: Callable[[float], None]
) -> None:
    """Train LoRA on the attention layers of a pipeline's U-Net, and remove it afterwards.

    Args:
        pipeline: a Stable Diffusion pipeline on the device of the training, in the dtype of `mixed_precision`.
        examples: images and captions.
        settings: options of the training.
        on_step: called after each step with its loss.
    """
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        gradient_accumulation_steps=1, mixed_precision=settings.mixed_precision, cpu=settings.cpu
    )
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    for model in (unet, vae, text_encoder):
        model.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=settings.rank, init_lora_weights="gaussian", target_modules=ATTENTION),
        "peer",
    )
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    try:
        _loop(accelerator, pipeline, examples, settings, on_step)
    finally:
        unet.disable_gradient_checkpointing()
        unet.delete_adapters("peer")
        unet.eval()


def _loop(
    accelerator: Accelerator,
    pipeline: Any,
    examples: Sequence[Example],
    settings: Settings,
    on_step: Callable[[float], None],
) -> None:
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    layers = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(layers, lr=settings.learning_rate, weight_decay=1e-2)
    images = Images(examples, pipeline.tokenizer, settings.resolution)
    dataset = Encoded(images, vae, text_encoder) if settings.cached else images
    loader = DataLoader(dataset, shuffle=True, batch_size=settings.batch_size, num_workers=0)
    schedule = get_scheduler("constant", optimizer, num_warmup_steps=0, num_training_steps=settings.steps)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    step = 0
    while step < settings.steps:
        unet.train()
        for batch in loader:
            with accelerator.accumulate(unet):
                latents, states = encode(batch, vae, text_encoder)
                loss = denoising_loss(unet, noise_scheduler, latents, states)
                average = accelerator.gather(loss.repeat(settings.batch_size)).mean().item()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(layers, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            step += 1
            on_step(average)
            if step == settings.steps:
                break


def encode(batch: Item, vae: Any, text_encoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and text embeddings of a batch, encoded from pixels and tokens, or taken from the cache."""
    if "pixels" in batch:
        latents = vae.encode(batch["pixels"].to(vae.dtype)).latent_dist.sample()
        states = text_encoder(batch["tokens"], return_dict=False)[0]
    else:
        latents = batch["mean"] + batch["std"] * torch.randn_like(batch["std"])
        states = batch["states"]
    return latents * vae.config.scaling_factor, states


def denoising_loss(unet: Any, noise_scheduler: Any, latents: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Return the script's loss: mean squared error to the scheduler's prediction target at random timesteps."""
    noise = torch.randn_like(latents)
    timesteps = torch.randint(
        0, noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
    ).long()
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = noise
    prediction = unet(noisy, timesteps, states, return_dict=False)[0]
    return F.mse_loss(prediction.float(), target.float(), reduction="mean")
