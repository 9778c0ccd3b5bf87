"""Settings of the loss."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ...utils.setting_groups import SettingGroup, setting


class LossConfig(SettingGroup):
    """What the base predicts, and how much each timestep counts."""

    snr_gamma: float | None = setting(None, affects="tuner", gt=0)
    """Min-SNR weighting of the loss; 5 is usual. On a base that predicts v_prediction it leaves hardly any weight to
    the noisiest steps, where captions matter most."""
    debiased_estimation: bool = setting(False, affects="tuner")
    """Weigh the loss by 1 / sqrt(SNR), which favours noisy steps."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = setting(None, affects="batches")
    """What the base predicts, where its scheduler says it wrongly."""
    rescale_betas_zero_snr: bool = setting(False, affects="batches")
    """Train with a last step of pure noise; generation then needs the same, with timestep spacing `trailing`."""

    @model_validator(mode="after")
    def _one_weighting(self) -> LossConfig:
        if self.debiased_estimation and self.snr_gamma is not None:
            raise ValueError("the loss has one weighting; choose snr_gamma or debiased_estimation")
        return self
