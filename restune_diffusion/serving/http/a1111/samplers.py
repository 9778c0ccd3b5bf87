"""A1111's names of samplers and schedule types, as names of schedulers here."""

from __future__ import annotations

from typing import Any

from ....pipelines.schedulers import SCHEDULER_NAMES, SIGMA_NAMES, sampler_labels
from ..errors import RequestError

AUTOMATIC = "automatic"
# Schedule types that A1111 takes for these samplers if none is named.
_USUAL = {"dpm2": "karras", "dpm2_a": "karras", "dpmpp_2m": "karras", "dpmpp_2m_sde": "exponential",
          "dpmpp_3m_sde": "exponential"}  # fmt: skip


def scheduler_of(sampler: str | None, schedule_type: str | None) -> str | None:
    """Return the name of a scheduler; None is the base's own.

    Args:
        sampler: A1111's name of a sampler, such as `DPM++ 2M` or `DPM++ 2M Karras`, or a name of a scheduler here.
        schedule_type: A1111's name of a schedule type: `Automatic`, `Karras`, `Exponential` or `Beta`.

    Raises:
        RequestError: if a name is unknown, or a schedule type comes without a sampler.
    """
    asked = (schedule_type or AUTOMATIC).strip().lower()
    if asked not in (AUTOMATIC, *SIGMA_NAMES):
        raise RequestError(
            f"Unknown schedule type `{(schedule_type or '')[:80]}`; GET /sdapi/v1/schedulers lists them.",
            param="scheduler",
        )
    if sampler is None or not sampler.strip():
        if asked != AUTOMATIC:
            raise RequestError(
                f"The schedule type `{asked}` needs a sampler; send `sampler_name` with it.", param="scheduler"
            )
        return None
    name, spacing = _sampler(sampler.strip())
    if asked != AUTOMATIC:
        spacing = asked
    elif spacing is None:
        spacing = _USUAL.get(name)
    return name if spacing is None else f"{name}_{spacing}"


def samplers() -> list[dict[str, Any]]:
    """Return the answer of `/sdapi/v1/samplers`."""
    return [{"name": label, "aliases": [name], "options": {}} for name, label in sampler_labels().items()]


def schedule_types() -> list[dict[str, Any]]:
    """Return the answer of `/sdapi/v1/schedulers`."""
    return [
        {"name": name, "label": name.capitalize(), "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name in (AUTOMATIC, *SIGMA_NAMES)
    ]


def _sampler(label: str) -> tuple[str, str | None]:
    """Return the name of a scheduler and the spacing that a label of older versions ends with."""
    # Aliases of A1111 begin with `k_`: `k_euler_a`.
    lower = label.lower().removeprefix("k_")
    names = {text.lower(): name for name, text in sampler_labels().items()}
    names |= {name: name for name in SCHEDULER_NAMES}
    if lower in names:
        return names[lower], None
    for spacing in SIGMA_NAMES:
        for separator in (" ", "_"):
            stem = lower.removesuffix(separator + spacing)
            if stem != lower and stem in names:
                return names[stem], spacing
    raise RequestError(f"Unknown sampler `{label[:80]}`; GET /sdapi/v1/samplers lists them.", param="sampler_name")
