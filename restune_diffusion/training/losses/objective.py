"""What the denoiser is asked to predict, and how far off it is."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler

from ...utils.errors import TrainingError
from .weighting import debiased_weights, min_snr_weights

_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def scheduler_changes(prediction_type: str | None, rescale_betas_zero_snr: bool = False) -> dict[str, Any]:
    """Return what a scheduler must be told, beyond the base's config, to draw with what is trained like this."""
    changes: dict[str, Any] = {}
    if prediction_type is not None:
        changes["prediction_type"] = prediction_type
    if rescale_betas_zero_snr:
        # A sampler must begin at the last timestep, for only there is its noise as in training (section 3.3).
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes


class Objective:
    """Adds noise to latents and scores predictions the way that the base was trained.

    Args:
        scheduler: the scheduler of the base's pipeline; its noise schedule and prediction type are used.
        snr_gamma: cap of the signal-to-noise ratio in the loss weights (min-SNR, arXiv 2303.09556).
        debiased_estimation: weigh the loss by `1 / sqrt(snr)` instead (arXiv 2310.08442).
        prediction_type: what the base predicts, where its scheduler does not say so.
        rescale_betas_zero_snr: let the last timestep be pure noise (arXiv 2305.08891, algorithm 1).

    Attributes:
        scheduler_changes: what a scheduler must be told, beyond the base's config, to draw with what is trained here.

    Raises:
        TrainingError: if the base predicts something that is not known here, or cannot be trained like this.
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
                f"The base's scheduler asks for `{self.prediction_type}`, which is not supported; "
                f"use a base that predicts epsilon, v_prediction or sample."
            )
        if rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise TrainingError(
                "A base that predicts noise learns nothing at zero signal, where the noise is its input; "
                "leave --rescale-betas-zero-snr out, or use a base that predicts v_prediction or sample."
            )
        self.noise_scheduler = DDPMScheduler.from_config(scheduler.config, **self.scheduler_changes)
        self.snr_gamma = snr_gamma
        self.debiased_estimation = debiased_estimation
        if not self.weights(torch.arange(self.timesteps)).isfinite().all():
            raise TrainingError(
                "The base's last timestep has no signal, so that its debiased weight is infinite; "
                "leave --debiased-estimation out."
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

    def loss(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the mean squared error in fp32, weighted by timestep if asked; see `sample_losses`."""
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
        """Return the weight of the squared error at each timestep, fp32; ones unless a weighting is asked for."""
        signal = self.noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
        snr = signal / (1 - signal)
        if self.snr_gamma is not None:
            return min_snr_weights(snr, self.prediction_type, self.snr_gamma)
        if self.debiased_estimation:
            return debiased_weights(snr, self.prediction_type)
        return torch.ones_like(snr)
