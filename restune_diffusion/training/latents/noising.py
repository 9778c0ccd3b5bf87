"""How noisy a training latent is made, and with what noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ...utils.errors import TrainingError

TimestepSampling: TypeAlias = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Noising:
    """What is drawn for each sample; the defaults are those of DDPM.

    Attributes:
        offset: size of a constant added to each channel's noise, so that a picture's mean is learnt too (Guttenberg,
            "Diffusion with offset noise", crosslabs.org, 2023); 0.1 there.
        perturbation: size of the noise that is added to the input's noise and not to the target (arXiv 2301.11706,
            algorithm 1); 0.1 there.
        sampling: `uniform`, or `logit_normal`, which prefers the middle of the range (arXiv 2403.03206, eq. 19).
        logit_mean, logit_std: of the normal distribution whose sigmoid is the place in the range; a mean above 0
            prefers noisy steps.
        low, high: range of the timesteps, `low <= t < high`; without `high` up to the last one.
    """

    offset: float = 0.0
    perturbation: float = 0.0
    sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    low: int = 0
    high: int | None = None

    def range(self, timesteps: int) -> tuple[int, int]:
        """Return the range to draw from on a base of so many timesteps.

        Raises:
            TrainingError: if it has no timestep in it, or the base has fewer.
        """
        high = timesteps if self.high is None else self.high
        if not self.low < high <= timesteps:
            raise TrainingError(
                f"The timesteps {self.low} to {high} cannot be drawn; the base has 0 to {timesteps}, "
                f"and --min-timestep must be below --max-timestep."
            )
        return self.low, high

    def timestep(self, timesteps: int, generator: torch.Generator) -> torch.Tensor:
        """Draw a timestep, an int64 scalar, on a base of so many."""
        low, high = self.range(timesteps)
        if self.sampling == "uniform":
            return torch.randint(low, high, (), generator=generator)
        logit = self.logit_mean + self.logit_std * torch.randn((), generator=generator, dtype=torch.float64)
        # The sigmoid of a large logit rounds to one, which is the end of the range and not in it.
        return (low + logit.sigmoid() * (high - low)).long().clamp(max=high - 1)

    def offset_for(self, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw what is added to the noise of one sample, channels x 1 x 1."""
        return self.offset * torch.randn(noise.shape[0], 1, 1, generator=generator)

    def perturbation_for(self, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw what is added to the noise of one sample in the denoiser's input alone, of the noise's shape."""
        return self.perturbation * torch.randn(noise.shape, generator=generator)
