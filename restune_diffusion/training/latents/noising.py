"""Noise and timesteps of training samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ...utils.errors import TrainingError

TimestepSampling: TypeAlias = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Noising:
    """Distributions of the noise and timestep of a sample; the defaults are those of DDPM.

    Attributes:
        offset: standard deviation of the constant added to each channel's noise, so that the mean brightness of images
            is learned too (Guttenberg, "Diffusion with offset noise", crosslabs.org, 2023, which uses 0.1).
        perturbation: standard deviation of the noise added to the input but not to the target (arXiv 2301.11706,
            algorithm 1, which uses 0.1).
        sampling: `uniform`, or `logit_normal`, which prefers the middle of the range (arXiv 2403.03206, eq. 19).
        logit_mean, logit_std: mean and standard deviation of the normal distribution whose sigmoid is the position in
            the range; a mean above 0 prefers noisy timesteps.
        low, high: range of the timesteps, `low <= t < high`; if `high` is None, up to the last timestep.
    """

    offset: float = 0.0
    perturbation: float = 0.0
    sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    low: int = 0
    high: int | None = None

    def range(self, timesteps: int) -> tuple[int, int]:
        """Return the range of timesteps, for a base with this number of timesteps.

        Raises:
            TrainingError: if the range is empty or exceeds the timesteps of the base.
        """
        high = timesteps if self.high is None else self.high
        if not self.low < high <= timesteps:
            raise TrainingError(
                f"Invalid range of timesteps {self.low} to {high}; it must be within 0 to {timesteps} for this base, "
                f"with --min-timestep below --max-timestep."
            )
        return self.low, high

    def timestep(self, timesteps: int, generator: torch.Generator) -> torch.Tensor:
        """Return a random timestep, an int64 scalar, for a base with this number of timesteps."""
        low, high = self.range(timesteps)
        if self.sampling == "uniform":
            return torch.randint(low, high, (), generator=generator)
        logit = self.logit_mean + self.logit_std * torch.randn((), generator=generator, dtype=torch.float64)
        # The sigmoid of a large logit rounds to 1, the excluded end of the range.
        return (low + logit.sigmoid() * (high - low)).long().clamp(max=high - 1)

    def offset_for(self, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the random offset of one sample's noise, channels x 1 x 1."""
        return self.offset * torch.randn(noise.shape[0], 1, 1, generator=generator)

    def perturbation_for(self, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the random perturbation of one sample's input noise, in the shape of the noise."""
        return self.perturbation * torch.randn(noise.shape, generator=generator)
