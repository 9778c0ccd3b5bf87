"""Loss settings."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ...utils.setting_groups import SettingGroup, setting

DEFAULT_SIGMA = 1.0
"""Standard deviation of the noise of `consistency`, if `consistency_sigma` is not set."""


class LossConfig(SettingGroup):
    """Prediction type of the base, and the weight of each timestep in the loss."""

    snr_gamma: float | None = setting(None, affects="tuner", gt=0)
    """Gamma of Min-SNR loss weighting; 5 is usual. With a v_prediction base, the noisiest timesteps, where captions
    matter most, get almost no weight."""
    debiased_estimation: bool = setting(False, affects="tuner")
    """Weight the loss by 1 / sqrt(SNR), which favors noisy timesteps."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = setting(None, affects="batches")
    """Prediction type of the base; set it only if the scheduler config of the checkpoint is wrong."""
    rescale_betas_zero_snr: bool = setting(False, affects="batches")
    """Rescale the betas to zero terminal SNR, so that the last timestep is pure noise. Generation then needs the same
    rescaling and the timestep spacing `trailing`."""
    consistency: float | None = setting(None, affects="tuner", ge=0, allow_inf_nan=False)
    """Weight of the consistency between two predictions with multiplicative noise on the tuner's outputs (PACE,
    NeurIPS 2024), against overfitting on few images; 0 adds the noise alone. A step computes both predictions, which
    takes about twice the time and the activations. With a bypass tuner, both share one pass of the base's blocks."""
    consistency_sigma: float | None = setting(None, affects="tuner", gt=0, allow_inf_nan=False)
    """Standard deviation of this noise where the tuner first acts; it falls linearly with depth. If not set, 1."""

    @model_validator(mode="after")
    def _one_weighting(self) -> LossConfig:
        if self.debiased_estimation and self.snr_gamma is not None:
            raise ValueError("snr_gamma and debiased_estimation are both set; choose one loss weighting")
        if self.consistency_sigma is not None and self.consistency is None:
            raise ValueError("consistency_sigma needs consistency; set consistency, or omit consistency_sigma")
        return self

    def check_consistency(self, only_text: bool, checkpointing: bool) -> None:
        """Raise `ValueError` if consistency does not go with the tuner to train or with gradient checkpointing."""
        if self.consistency is None:
            return
        if only_text:
            raise ValueError(
                "consistency adds noise to a tuner of the denoiser, but the tuner to train acts on the text encoders "
                "only; leave consistency out, or add another family to tuner"
            )
        if checkpointing:
            raise ValueError(
                "gradient_checkpointing computes outputs again without the noise of consistency; leave one of them out"
            )
