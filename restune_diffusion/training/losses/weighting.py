"""Loss weights by signal-to-noise ratio.

An error `e` of the clean latent is an error of `sqrt(snr) e` in the noise and `sqrt(snr + 1) e` in the velocity. The
ratio of the squares converts a weight that a paper gives for one quantity to another, so that every prediction type
has the same objective.
"""

from __future__ import annotations

import torch


def min_snr_weights(snr: torch.Tensor, prediction_type: str, gamma: float) -> torch.Tensor:
    """Return `min(snr, gamma)` per squared error of the clean latent (arXiv 2303.09556, section 3.4).

    Toward pure noise, the weight of a predicted velocity, `min(snr, gamma) / (snr + 1)`, falls to zero, while that of
    predicted noise stays at one. So with velocity, little is learned at the timesteps where captions determine the
    image.

    Args:
        snr: signal-to-noise ratios, of any shape; zero is allowed.
        prediction_type: prediction type of the denoiser: `epsilon`, `v_prediction` or `sample`.
        gamma: cap of the ratio; 5 in the paper.
    """
    if prediction_type == "epsilon":
        # equal to min(snr, gamma) / snr, but finite if the last timestep has no signal
        return (gamma / snr).clamp(max=1)
    return _per_prediction(snr.clamp(max=gamma), snr, prediction_type)


def debiased_weights(snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Return `1 / sqrt(snr)` per squared error of the noise (arXiv 2310.08442), for every prediction type.

    For predicted noise it is unbounded toward pure noise.
    """
    if prediction_type == "epsilon":
        return snr.rsqrt()
    return _per_prediction(snr.sqrt(), snr, prediction_type)


def _per_prediction(per_latent: torch.Tensor, snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    return per_latent / (snr + 1) if prediction_type == "v_prediction" else per_latent
