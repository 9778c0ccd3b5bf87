"""What the denoiser is asked to predict, and how far off it is."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler

from ..errors import TrainingError


class Objective:
    """Adds noise to latents and scores predictions the way that the base was trained.

    Args:
        scheduler: the scheduler of the base's pipeline; its noise schedule and prediction type are used.
        snr_gamma: cap of the signal-to-noise ratio in the loss weights (min-SNR, arXiv 2303.09556).

    Raises:
        TrainingError: if the base predicts something that is not known here.
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None = None) -> None:
        self.noise_scheduler = DDPMScheduler.from_config(scheduler.config)
        self.prediction_type: str = self.noise_scheduler.config.prediction_type
        self.snr_gamma = snr_gamma
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise TrainingError(
                f"The base's scheduler asks for `{self.prediction_type}`, which is not supported; "
                f"use a base that predicts epsilon, v_prediction or sample."
            )

    @property
    def timesteps(self) -> int:
        """Number of noise levels that training draws from."""
        return int(self.noise_scheduler.config.num_train_timesteps)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the noisy latents that the denoiser sees."""
        noisy: torch.Tensor = self.noise_scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return what the denoiser should predict."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        velocity: torch.Tensor = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def loss(self, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error in fp32, weighted by timestep if asked."""
        errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
        if self.snr_gamma is not None:
            errors = errors * self.weights(timesteps, self.snr_gamma)
        return errors.mean()

    def weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return the min-SNR weight of each timestep, `min(snr, gamma)` in terms of the predicted quantity."""
        signal = self.noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
        snr = signal / (1 - signal)
        if self.prediction_type == "epsilon":
            # the same as min(snr, gamma) / snr, but finite where the last step keeps no signal at all
            return (gamma / snr).clamp(max=1)
        if self.prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        return snr.clamp(max=gamma)
