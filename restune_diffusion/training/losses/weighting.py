"""Weights of the loss by signal-to-noise ratio.

An error `e` of the clean latent is an error of `sqrt(snr) e` in the noise and `sqrt(snr + 1) e` in the velocity. So a
weight that a paper gives for one quantity is carried over to another by the ratio of these squares, and every kind of
prediction is trained for the same thing.
"""

from __future__ import annotations

import torch


def min_snr_weights(snr: torch.Tensor, prediction_type: str, gamma: float) -> torch.Tensor:
    """Return `min(snr, gamma)` per squared error of the clean latent (arXiv 2303.09556, section 3.4).

    Towards pure noise the weight of a predicted velocity, `min(snr, gamma) / (snr + 1)`, falls to zero with the ratio,
    where that of predicted noise stays at one: little is then learnt where captions decide about the picture.

    Args:
        snr: signal-to-noise ratios, of any shape; zero is allowed.
        prediction_type: what the denoiser predicts: `epsilon`, `v_prediction` or `sample`.
        gamma: the cap; 5 in the paper.
    """
    if prediction_type == "epsilon":
        # the same as min(snr, gamma) / snr, but finite where the last step keeps no signal at all
        return (gamma / snr).clamp(max=1)
    return _per_prediction(snr.clamp(max=gamma), snr, prediction_type)


def debiased_weights(snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Return `1 / sqrt(snr)` per squared error of the noise (arXiv 2310.08442), for whatever is predicted.

    For predicted noise it grows without bound towards pure noise.
    """
    if prediction_type == "epsilon":
        return snr.rsqrt()
    return _per_prediction(snr.sqrt(), snr, prediction_type)


def _per_prediction(per_latent: torch.Tensor, snr: torch.Tensor, prediction_type: str) -> torch.Tensor:
    return per_latent / (snr + 1) if prediction_type == "v_prediction" else per_latent
