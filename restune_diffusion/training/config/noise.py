"""Settings of the noise and the timesteps that training draws."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ...utils.setting_groups import SettingGroup, setting


class NoiseConfig(SettingGroup):
    """Noise of the training samples, and how their timesteps are sampled."""

    noise_offset: float = setting(0.0, affects="batches", swept=True, ge=0)
    """Noise that is constant over a channel, for darker and brighter images; 0.05 to 0.1 is usual."""
    input_perturbation: float = setting(0.0, affects="batches", swept=True, ge=0)
    """More noise in the input than the target tells, against exposure bias; 0.1 is usual."""
    timestep_sampling: Literal["uniform", "logit_normal"] = setting("uniform", affects="batches", swept=True)
    """How often each timestep is trained; `logit_normal` favours the middle."""
    logit_mean: float = setting(0.0, affects="batches", swept=True)
    """Mean of `logit_normal`; above 0 noisier steps are favoured."""
    logit_std: float = setting(1.0, affects="batches", swept=True, gt=0)
    """Spread of `logit_normal`."""
    min_timestep: int = setting(0, affects="batches", swept=True, ge=0)
    """First timestep to train; timestep 0 is nearly free of noise."""
    max_timestep: int | None = setting(None, affects="batches", swept=True, gt=0)
    """Where the timesteps to train end; this one itself is not trained. The base's last where not given."""

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> NoiseConfig:
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError("min_timestep must be below max_timestep")
        return self
