"""Training objective: noisy latents, target of the prediction, and loss."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler

from ...utils.errors import TrainingError
from .weighting import debiased_weights, min_snr_weights

_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def scheduler_changes(prediction_type: str | None, rescale_betas_zero_snr: bool = False) -> dict[str, Any]:
    """Return the scheduler settings for sampling after training with these, in addition to the base's config."""
    changes: dict[str, Any] = {}
    if prediction_type is not None:
        changes["prediction_type"] = prediction_type
    if rescale_betas_zero_snr:
        # Sampling must start at the last timestep, the only one with pure noise as in training (section 3.3).
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes


class Objective:
    """Training objective of the base: adds noise to latents, and computes targets and losses.

    Args:
        scheduler: the scheduler of the base's pipeline; its noise schedule and prediction type are used.
        snr_gamma: cap of the signal-to-noise ratio in the loss weights (min-SNR, arXiv 2303.09556).
        debiased_estimation: weight the loss by `1 / sqrt(snr)` instead (arXiv 2310.08442).
        prediction_type: prediction type of the base; that of its scheduler's config if None.
        rescale_betas_zero_snr: make the last timestep pure noise (arXiv 2305.08891, algorithm 1).

    Attributes:
        scheduler_changes: scheduler settings that sampling needs in addition to the base's config.

    Raises:
        TrainingError: if the prediction type is not supported, or these settings cannot be used with the base.
    """

    def __init__(
        self,
        scheduler: Any,
        snr_gamma: float | None = None,
        *,
        debiased_estimation: bool = False,
        prediction_type: str | None = None,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self.scheduler_changes = scheduler_changes(prediction_type, rescale_betas_zero_snr)
        self.prediction_type: str = prediction_type or scheduler.config.get("prediction_type", "epsilon")
        if self.prediction_type not in _PREDICTION_TYPES:
            raise TrainingError(
                f"The prediction type `{self.prediction_type}` of the base's scheduler is not supported; "
                f"use a base that predicts epsilon, v_prediction or sample."
            )
        if rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise TrainingError(
                "A base that predicts noise learns nothing at zero signal, where the noise is its input; "
                "omit --rescale-betas-zero-snr, or use a base that predicts v_prediction or sample."
            )
        self.noise_scheduler = DDPMScheduler.from_config(scheduler.config, **self.scheduler_changes)
        self.snr_gamma = snr_gamma
        self.debiased_estimation = debiased_estimation
        if not self.weights(torch.arange(self.timesteps)).isfinite().all():
            raise TrainingError(
                "The base's last timestep has no signal, so its debiased weight is infinite; "
                "omit --debiased-estimation."
            )

    @property
    def timesteps(self) -> int:
        """Number of training timesteps of the base."""
        return int(self.noise_scheduler.config.num_train_timesteps)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the noisy latents, the input of the denoiser."""
        noisy: torch.Tensor = self.noise_scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the target of the denoiser's prediction."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        velocity: torch.Tensor = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def loss(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the mean squared error in fp32, with the weights of the timesteps; see `sample_losses`."""
        return self.sample_losses(prediction, target, timesteps, mask).mean()

    def sample_losses(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of each sample, `(samples,)` in fp32; their mean is the loss.

        With a mask, samples x 1 x height x width, it is the weighted mean `sum(mask * error) / sum(mask)` of each
        sample, so that a small mask counts as much as a large one.
        """
        squares = (prediction.float() - target.float()).square()
        if mask is None:
            errors = squares.flatten(1).mean(1)
        else:
            weights = mask.float().expand_as(squares)
            errors = (weights * squares).flatten(1).sum(1) / weights.flatten(1).sum(1)
        return errors * self.weights(timesteps)

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the weight of the squared error at each timestep, fp32; ones if no weighting is set."""
        # Kept on the device, as by the scheduler's own methods, so that only the first step copies it.
        self.noise_scheduler.alphas_cumprod = self.noise_scheduler.alphas_cumprod.to(timesteps.device)
        signal = self.noise_scheduler.alphas_cumprod[timesteps].float()
        snr = signal / (1 - signal)
        if self.snr_gamma is not None:
            return min_snr_weights(snr, self.prediction_type, self.snr_gamma)
        if self.debiased_estimation:
            return debiased_weights(snr, self.prediction_type)
        return torch.ones_like(snr)
