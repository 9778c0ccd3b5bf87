from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from restune_diffusion.errors import TrainingError
from restune_diffusion.training.objective import Objective

LATENTS = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
NOISE = torch.tensor([[0.5, -1.0], [2.0, 1.0]])
STEPS = torch.tensor([100, 900])


def objective(prediction_type: str, gamma: float | None = None) -> Objective:
    return Objective(DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type), gamma)


def signal_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt of alpha-bar and of 1 - alpha-bar, from the definition."""
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2
    kept = torch.cumprod(1 - betas, 0)[STEPS][:, None]
    return kept.sqrt(), (1 - kept).sqrt()


def test_noisy_latents() -> None:
    alpha, sigma = signal_and_noise()
    noisy = objective("epsilon").add_noise(LATENTS, NOISE, STEPS)
    torch.testing.assert_close(noisy, alpha * LATENTS + sigma * NOISE)


def test_targets() -> None:
    alpha, sigma = signal_and_noise()
    assert torch.equal(objective("epsilon").target(LATENTS, NOISE, STEPS), NOISE)
    assert torch.equal(objective("sample").target(LATENTS, NOISE, STEPS), LATENTS)
    velocity = objective("v_prediction").target(LATENTS, NOISE, STEPS)
    torch.testing.assert_close(velocity, alpha * NOISE - sigma * LATENTS)


def test_loss_is_the_mean_squared_error_in_fp32() -> None:
    prediction, target = torch.full((2, 3), 300.0).half(), torch.zeros(2, 3)
    # the square of 300 is beyond fp16
    assert objective("epsilon").loss(prediction, target, STEPS).item() == 90000


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_clean_latent_alike(prediction_type: str) -> None:
    """Whatever is predicted, an error of the clean latent must cost min(snr, gamma) times its square."""
    alpha, sigma = signal_and_noise()
    snr = (alpha / sigma).square().squeeze(1)
    gamma = 5.0
    assert snr[0] > gamma > snr[1], "the two steps must lie on either side of the cap"
    # the error of the prediction that one unit of error in the clean latent causes
    error = {"epsilon": alpha / sigma, "v_prediction": 1 / sigma, "sample": torch.ones(2, 1)}[prediction_type]
    weights = objective(prediction_type, gamma).weights(STEPS)
    torch.testing.assert_close(weights * error.square().squeeze(1), snr.clamp(max=gamma))
    target = torch.zeros(2, 2)
    loss = objective(prediction_type, gamma).loss(target + error, target, STEPS)
    torch.testing.assert_close(loss, snr.clamp(max=gamma).mean())


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(TrainingError, match="flow"):
        objective("flow")
