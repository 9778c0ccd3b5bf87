"""Schedulers by name keep the settings of the base."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from restune_diffusion import RestuneError
from restune_diffusion.pipelines.schedulers import (
    SCHEDULER_NAMES,
    SIGMA_NAMES,
    check_scheduler_name,
    named_scheduler,
    scheduler_label,
)

BASE = {
    "beta_start": 0.001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "num_train_timesteps": 500,
}


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_a_named_scheduler_has_the_settings_of_the_base(name):
    scheduler = named_scheduler(name, DDIMScheduler(**BASE))
    assert {key: scheduler.config[key] for key in BASE if key in scheduler.config} == BASE
    scheduler.set_timesteps(4)
    assert len(scheduler.timesteps) >= 4
    label, spacing = scheduler_label(scheduler)
    assert spacing is None
    assert label.lower().replace("++", "pp").replace(" ", "_") in (name, "plms")


@pytest.mark.parametrize("sigmas", ["karras", "exponential"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "euler", "heun", "unipc", "deis"])
def test_the_spacing_of_sigmas_is_part_of_the_name(name, sigmas):
    base = DDIMScheduler(**BASE)
    spaced = named_scheduler(f"{name}_{sigmas}", base)
    plain = named_scheduler(name, spaced)
    spaced.set_timesteps(6)
    plain.set_timesteps(6)
    assert scheduler_label(spaced) == (scheduler_label(plain)[0], sigmas.capitalize())
    # A name without a spacing has none, even after a scheduler with one.
    assert scheduler_label(plain)[1] is None
    assert not torch.allclose(spaced.sigmas.double(), plain.sigmas.double())


@pytest.mark.parametrize("name", ["", "dpm++", "Euler", "euler_karras_karras", "euler-karras", "karras"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(RestuneError, match=r"is unknown; use one of ddim, .*dpmpp_2m.*dpmpp_2m_karras"):
        check_scheduler_name(name)
    assert set(SIGMA_NAMES) == {"karras", "exponential", "beta"}


def test_a_setting_that_a_scheduler_does_not_support_is_refused():
    ztsnr = DDIMScheduler(**BASE, rescale_betas_zero_snr=True)
    assert named_scheduler("euler", ztsnr).config.rescale_betas_zero_snr
    with pytest.raises(RestuneError, match="`pndm` does not support rescale_betas_zero_snr = True"):
        named_scheduler("pndm", ztsnr)
    with pytest.raises(RestuneError, match="`lcm` has no karras sigmas"):
        named_scheduler("lcm_karras", ztsnr)


def test_a_scheduler_that_a1111_lacks_is_named_by_its_class():
    assert scheduler_label(EulerDiscreteScheduler()) == ("Euler", None)
    from diffusers import DPMSolverSinglestepScheduler

    assert scheduler_label(DPMSolverSinglestepScheduler()) == ("DPMSolverSinglestepScheduler", None)
