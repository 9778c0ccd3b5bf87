"""Noise and timestep settings."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ...utils.setting_groups import SettingGroup, setting


class NoiseConfig(SettingGroup):
    """Noise of the training samples, and the distribution of their timesteps."""

    noise_offset: float = setting(0.0, affects="batches", swept=True, ge=0)
    """Strength of noise that is constant over a channel, for darker and brighter images; 0.05 to 0.1 is usual."""
    input_perturbation: float = setting(0.0, affects="batches", swept=True, ge=0)
    """Strength of extra noise in the input that the target does not contain, against exposure bias; 0.1 is usual."""
    timestep_sampling: Literal["uniform", "logit_normal"] = setting("uniform", affects="batches", swept=True)
    """Distribution of the training timesteps; `logit_normal` favors the middle ones."""
    logit_mean: float = setting(0.0, affects="batches", swept=True)
    """Mean of `logit_normal`; above 0 it favors noisier timesteps."""
    logit_std: float = setting(1.0, affects="batches", swept=True, gt=0)
    """Standard deviation of `logit_normal`."""
    min_timestep: int = setting(0, affects="batches", swept=True, ge=0)
    """Lowest timestep to train on; timestep 0 is nearly free of noise."""
    max_timestep: int | None = setting(None, affects="batches", swept=True, gt=0)
    """End of the range of training timesteps, exclusive. If not set, the range includes the base's last timestep."""

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> NoiseConfig:
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError("min_timestep must be below max_timestep")
        return self
