from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.utils.errors import TrainingError

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
    """For every prediction type, an error of the clean latent must cost min(snr, gamma) times its square."""
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


def float64_snr(rescaled: bool = False) -> torch.Tensor:
    """Signal-to-noise ratio of all timesteps, in float64 from the definition; rescaled by arXiv 2305.08891, alg. 1."""
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    root = torch.cumprod(1 - betas, 0).sqrt()
    if rescaled:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2 / (1 - root**2)


EVERY = torch.arange(1000)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_those_of_the_paper(prediction_type: str) -> None:
    """arXiv 2303.09556, section 3.4: for x0, noise and velocity."""
    snr = float64_snr()
    capped = snr.clamp(max=5.0)
    expected = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[prediction_type]
    torch.testing.assert_close(objective(prediction_type, 5.0).weights(EVERY).double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_debiased_weights_are_those_of_the_paper(prediction_type: str) -> None:
    """arXiv 2310.08442: 1 / sqrt(SNR) of the noise's error, for every prediction type."""
    snr = float64_snr()
    # squared error of the noise that one unit of error of the prediction causes
    noise_error = {"epsilon": torch.ones_like(snr), "v_prediction": snr / (snr + 1), "sample": snr}[prediction_type]
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    weights = Objective(scheduler, debiased_estimation=True).weights(EVERY)
    torch.testing.assert_close(weights.double(), noise_error / snr.sqrt(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_rescales_the_schedule_as_the_paper_does(prediction_type: str) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    rescaled = Objective(scheduler, rescale_betas_zero_snr=True)
    snr = float64_snr(rescaled=True)
    signal = (snr / (1 + snr)).sqrt()
    ones = torch.ones(1000, 1, dtype=torch.float64)
    noisy = rescaled.add_noise(ones, torch.zeros_like(ones), EVERY)
    torch.testing.assert_close(noisy[:, 0], signal, atol=1e-4, rtol=0)
    assert noisy[-1] == 0, "the last step is pure noise"
    # there the velocity is minus the latent: v = sqrt(a) e - sqrt(1 - a) x
    last, latent = torch.tensor([999]), torch.tensor([[2.0, -3.0]])
    wanted = -latent if prediction_type == "v_prediction" else latent
    torch.testing.assert_close(rescaled.target(latent, torch.ones(1, 2), last), wanted)
    assert Objective(scheduler, 5.0, rescale_betas_zero_snr=True).weights(last).item() == 0
    assert rescaled.scheduler_changes == {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def test_zero_terminal_snr_is_refused_if_nothing_can_be_learned() -> None:
    with pytest.raises(TrainingError, match="predicts noise learns nothing at zero signal"):
        Objective(DDPMScheduler(), rescale_betas_zero_snr=True)
    with pytest.raises(TrainingError, match="debiased weight is infinite"):
        Objective(DDPMScheduler(rescale_betas_zero_snr=True), debiased_estimation=True)


def test_the_prediction_type_can_be_overridden() -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    alpha, sigma = signal_and_noise()
    velocity = Objective(scheduler, prediction_type="v_prediction")
    torch.testing.assert_close(velocity.target(LATENTS, NOISE, STEPS), alpha * NOISE - sigma * LATENTS)
    assert velocity.scheduler_changes == {"prediction_type": "v_prediction"}
    assert scheduler.config.prediction_type == "epsilon", "the base's own scheduler stays as it was"


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(TrainingError, match="The prediction type `flow` of the base's scheduler is not supported"):
        objective("flow")
