"""One request inside the engine, from admission to the finished latents."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from ..requests import ImageRequest
from ..tickets import Ticket
from .views import Task

Size = tuple[int, int]
"""Height and width of the latents."""


@dataclass(eq=False)
class Job:
    """Request that the engine has accepted.

    Args:
        ticket: the caller's handle.
        task: text-to-image, image-to-image or inpainting.
        scheduler: the request's own scheduler, with its timesteps set.
        width: width of the image in pixels.
        height: height of the image in pixels.
        size: height and width of the latents, which decide what requests share a U-Net call.
        loading: the tuners, if another thread reads their files.
    """

    ticket: Ticket
    task: Task
    scheduler: Any
    width: int
    height: int
    size: Size
    rows: int
    loading: Future[Any] | None = None
    uses: list[Any] = field(default_factory=list)
    """Attached tuners that the request keeps in use, each with its weight."""
    state: Denoising | None = None
    started: float = 0.0
    """Time of the first step."""
    finished: float = 0.0
    """Time after the last step."""

    @property
    def request(self) -> ImageRequest:
        """The request."""
        return self.ticket.request


@dataclass(eq=False)
class Inpainting:
    """Inputs of inpainting, of one image."""

    mask: torch.Tensor
    """1 where the image is repainted, `(1, 1, height, width)`."""
    masked: torch.Tensor
    """Latents of the image with the masked area removed."""
    image: torch.Tensor | None
    """Latents of the image, for a U-Net without mask input."""
    noise: torch.Tensor


@dataclass(eq=False)
class Denoising:
    """State of one image between two U-Net calls; the loop of diffusers' pipelines, one step at a time.

    Args:
        scheduler: the image's own scheduler.
        timesteps: the timesteps, on the host.
        latents: the latents, `(1, channels, height, width)`.
        embeds: text embeddings, `(rows, tokens, width)`: of the prompt, after those of the negative prompt if there
            is guidance.
        guidance: scale of classifier-free guidance, or None without it.
        step_options: further arguments of the scheduler's `step`.
        added: further conditioning of the U-Net by name, one row per row (Stable Diffusion XL).
        timestep_cond: embedding of the guidance scale, for a distilled U-Net, `(1, channels)`.
        inpainting: inputs of inpainting.
        takes_mask: whether the U-Net has inputs for the mask and the masked image.
        conditions: encoded condition images of the attached tuners, by their name.
    """

    scheduler: Any
    timesteps: torch.Tensor
    latents: torch.Tensor
    embeds: torch.Tensor
    guidance: float | None
    step_options: Mapping[str, Any]
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)
    timestep_cond: torch.Tensor | None = None
    inpainting: Inpainting | None = None
    takes_mask: bool = False
    conditions: dict[str, Any] = field(default_factory=dict)
    index: int = 0

    def __post_init__(self) -> None:
        self.progress_times = self.timesteps.tolist()

    @property
    def rows(self) -> int:
        """Number of rows in a batch."""
        return len(self.embeds)

    @property
    def steps(self) -> int:
        """Number of U-Net calls."""
        return len(self.progress_times)

    @property
    def done(self) -> bool:
        """Whether the last step is done."""
        return self.index >= self.steps

    @property
    def timestep(self) -> float:
        """Timestep of the next U-Net call."""
        return float(self.progress_times[self.index])

    @torch.no_grad()
    def model_input(self) -> torch.Tensor:
        """Return the rows of the next U-Net call."""
        latents = torch.cat([self.latents] * self.rows) if self.rows > 1 else self.latents
        scaled = self.scheduler.scale_model_input(latents, self.timesteps[self.index])
        if self.takes_mask:
            assert self.inpainting is not None
            extra = torch.cat([self.inpainting.mask, self.inpainting.masked], dim=1)
            scaled = torch.cat([scaled, extra.expand(self.rows, -1, -1, -1)], dim=1)
        return scaled

    @torch.no_grad()
    def advance(self, predicted: torch.Tensor, estimate: bool = False) -> torch.Tensor | None:
        """Take a step with the U-Net's prediction for the rows.

        Args:
            predicted: the prediction.
            estimate: whether to return an estimate of the finished latents.
        """
        if self.guidance is not None:
            negative, positive = predicted.chunk(2)
            predicted = negative + self.guidance * (positive - negative)
        timestep = self.timesteps[self.index]
        estimated = self._estimate(predicted, timestep) if estimate else None
        self.latents = self.scheduler.step(predicted, timestep, self.latents, **self.step_options, return_dict=False)[
            0
        ]
        if self.inpainting is not None and self.inpainting.image is not None:
            self._keep_unmasked(self.inpainting, self.inpainting.image)
        self.index += 1
        return estimated

    def _estimate(self, predicted: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return the latents without noise that a prediction stands for; the same for all schedulers."""
        config = self.scheduler.config
        signals = self.scheduler.alphas_cumprod
        signal = signals[min(len(signals) - 1, round(float(timestep)))].to(predicted)
        # The input of the U-Net has unit variance also where a scheduler's latents do not.
        noisy = self.scheduler.scale_model_input(self.latents, timestep)
        if config.prediction_type == "v_prediction":
            return signal.sqrt() * noisy - (1 - signal).sqrt() * predicted
        if config.prediction_type == "sample":
            return predicted
        return (noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()

    def _keep_unmasked(self, inpainting: Inpainting, image: torch.Tensor) -> None:
        if self.index < self.steps - 1:
            following = torch.tensor([self.timesteps[self.index + 1]])
            image = self.scheduler.add_noise(image, inpainting.noise, following)
        self.latents = (1 - inpainting.mask) * image + inpainting.mask * self.latents
