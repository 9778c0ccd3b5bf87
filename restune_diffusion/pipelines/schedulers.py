"""Schedulers by the names of other programs, with the base's own settings."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..utils.errors import RestuneError


@dataclass(frozen=True)
class _Sampler:
    class_name: str
    label: str
    """Name in A1111, where it has this sampler."""
    settings: Mapping[str, Any] = field(default_factory=dict)


_SDE = {"algorithm_type": "sde-dpmsolver++"}
_SAMPLERS = {
    "ddim": _Sampler("DDIMScheduler", "DDIM"),
    "ddpm": _Sampler("DDPMScheduler", "DDPM"),
    "deis": _Sampler("DEISMultistepScheduler", "DEIS"),
    "dpm2": _Sampler("KDPM2DiscreteScheduler", "DPM2"),
    "dpm2_a": _Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    "dpmpp_2m": _Sampler(
        "DPMSolverMultistepScheduler", "DPM++ 2M", {"algorithm_type": "dpmsolver++", "solver_order": 2}
    ),
    "dpmpp_2m_sde": _Sampler("DPMSolverMultistepScheduler", "DPM++ 2M SDE", {**_SDE, "solver_order": 2}),
    "dpmpp_3m_sde": _Sampler("DPMSolverMultistepScheduler", "DPM++ 3M SDE", {**_SDE, "solver_order": 3}),
    "euler": _Sampler("EulerDiscreteScheduler", "Euler"),
    "euler_a": _Sampler("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": _Sampler("HeunDiscreteScheduler", "Heun"),
    "lcm": _Sampler("LCMScheduler", "LCM"),
    "pndm": _Sampler("PNDMScheduler", "PLMS"),
    "tcd": _Sampler("TCDScheduler", "TCD"),
    "unipc": _Sampler("UniPCMultistepScheduler", "UniPC"),
}
_SIGMAS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
# Settings of a base without which a scheduler would sample from another model.
_OF_THE_MODEL = ("prediction_type", "rescale_betas_zero_snr")

SCHEDULER_NAMES = tuple(_SAMPLERS)
SIGMA_NAMES = tuple(_SIGMAS)


def check_scheduler_name(name: str) -> None:
    """Raise `RestuneError` if a name is not `NAME`, or `NAME_SIGMAS` as in `dpmpp_2m_karras`."""
    _parse(name)


def named_scheduler(name: str, current: Any) -> Any:
    """Return a scheduler with the settings of another: its betas, prediction type and timestep spacing are kept.

    Args:
        name: name of the sampler, optionally with the spacing of its sigmas: `euler`, `dpmpp_2m_karras`.
        current: scheduler of the base.

    Raises:
        RestuneError: if the name is unknown, or the scheduler does not support a setting of the base.
    """
    sampler, sigmas = _parse(name)
    scheduler_class = getattr(importlib.import_module("diffusers"), sampler.class_name)
    known = inspect.signature(scheduler_class.__init__).parameters
    # The name says all about the spacing of the sigmas, also that there is none.
    spacing = {setting: key == sigmas for key, setting in _SIGMAS.items() if setting in known}
    if sigmas is not None and _SIGMAS[sigmas] not in known:
        raise RestuneError(
            f"The scheduler `{name.rpartition('_')[0]}` has no {sigmas} sigmas; use dpmpp_2m_{sigmas} or "
            f"euler_{sigmas}."
        )
    for setting in _OF_THE_MODEL:
        if current.config.get(setting) and setting not in known:
            raise RestuneError(
                f"The scheduler `{name}` does not support {setting} = {current.config[setting]} of this base; use "
                "`ddim` or `euler`."
            )
    return scheduler_class.from_config(current.config, **sampler.settings, **spacing)


def sampler_labels() -> dict[str, str]:
    """Return the names of the samplers in A1111, by their names here."""
    return {name: sampler.label for name, sampler in _SAMPLERS.items()}


def scheduler_label(scheduler: Any) -> tuple[str, str | None]:
    """Return the name of a scheduler in A1111, and the spacing of its sigmas if it is not the default.

    A scheduler that A1111 does not have is named by its class.
    """
    config = scheduler.config
    spacing = next((key.capitalize() for key, setting in _SIGMAS.items() if config.get(setting)), None)
    for sampler in _SAMPLERS.values():
        settings = sampler.settings.items()
        if type(scheduler).__name__ == sampler.class_name and all(config.get(key) == value for key, value in settings):
            return sampler.label, spacing
    return type(scheduler).__name__, spacing


def _parse(name: str) -> tuple[_Sampler, str | None]:
    if name in _SAMPLERS:
        return _SAMPLERS[name], None
    stem, _, sigmas = name.rpartition("_")
    if stem not in _SAMPLERS or sigmas not in _SIGMAS:
        raise RestuneError(
            f"The scheduler `{name}` is unknown; use one of {', '.join(SCHEDULER_NAMES)}, most of them also with "
            f"{', '.join(f'_{sigma}' for sigma in SIGMA_NAMES)}, for example `dpmpp_2m_karras`."
        )
    return _SAMPLERS[stem], sigmas
