"""Apply skip tuners through ComfyUI's model patcher: one output block patch adds the residuals of all tuners.

ComfyUI's U-Net calls each output block patch as `patch(h, hsp, transformer_options)` before it joins the hidden state
`h` with the skip feature `hsp`; `transformer_options["block"]` is `("output", number)`, counted from the deepest
skip (`comfy/ldm/modules/diffusionmodules/openaimodel.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from restune_diffusion import BaseInfo, BaseMismatchError, RestuneError, Tuner
from restune_diffusion.tuners import Features, Part

_PATCHES = "output_block_patch"


@dataclass(frozen=True)
class ActiveTuner:
    """A tuner with its weight and its range of noise levels."""

    tuner: Tuner
    weight: float
    sigma_start: float
    sigma_end: float
    always: bool
    """Whether the tuner acts at every noise level; the sigmas are not read then."""

    def acts(self, noise_level: Callable[[], float]) -> bool:
        """Return whether the tuner acts at the noise level of a batch."""
        if self.weight == 0:
            return False
        return self.always or self.sigma_end <= noise_level() <= self.sigma_start

    def residual(self, site: str, skip: torch.Tensor) -> torch.Tensor:
        """Return the tuner's residual for a skip feature, in the dtype of the feature."""
        (part,) = self.tuner.parts()
        assert isinstance(part, Part)
        if site not in part.writes:
            return torch.zeros_like(skip)
        if self.tuner.device != skip.device:
            self.tuner.to(skip.device)
        return (self.weight * part(site, skip, Features())).to(skip.dtype)


class SkipPatch:
    """Output block patch that adds the residuals of all tuners, each computed from the unchanged skip feature."""

    def __init__(self, tuners: Sequence[ActiveTuner], skips: int) -> None:
        self.tuners = tuple(tuners)
        self._skips = skips
        self._read: tuple[torch.Tensor, int, float] | None = None

    def __call__(
        self, h: torch.Tensor, hsp: torch.Tensor, transformer_options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the unchanged hidden state, and the tuned skip feature `(batch, channels, height, width)`."""
        _, number = transformer_options["block"]
        site, total = f"skip.{self._skips - 1 - number}", hsp
        for tuner in self.tuners:
            if tuner.acts(lambda: self._noise_level(transformer_options["sigmas"])):
                total = total + tuner.residual(site, hsp)
        return h, total

    def _noise_level(self, sigmas: torch.Tensor) -> float:
        """Return the noise level of a batch, whose images are all at the same step.

        All blocks of a forward pass get the same tensor. It is read for the first one, because the host waits for the
        device then.
        """
        if self._read is None or self._read[0] is not sigmas or self._read[1] != sigmas._version:
            self._read = (sigmas, sigmas._version, float(sigmas[0]))
        return self._read[2]

    def __deepcopy__(self, memo: object) -> SkipPatch:
        # ComfyUI copies a model's options with the model; the tuners are shared because they are never changed.
        return self

    def to(self, target: object) -> SkipPatch:
        """Move the tuners to the device of the model; their dtype does not change."""
        if isinstance(target, torch.device):
            for active in self.tuners:
                active.tuner.to(target)
        return self


def apply_tuner(model: Any, tuner: Tuner, weight: float, start_percent: float, end_percent: float) -> Any:
    """Return a copy of a model patcher with a tuner applied, in addition to the tuners applied before.

    Args:
        model: ComfyUI's `ModelPatcher` of a Stable Diffusion model.
        tuner: a tuner with a `skip` part and no other part.
        weight: factor on the tuner's residuals.
        start_percent: start of the tuner's range of sampling progress, 0 to 1.
        end_percent: end of the range, 0 to 1.

    Raises:
        RestuneError: if the tuner has other parts.
        BaseMismatchError: if the structure of the model differs from that of the tuner's base.
    """
    parts = [config.part for config in tuner.configs]
    if parts != ["skip"]:
        raise RestuneError(f"ComfyUI supports only tuners with a single skip part; this one has {', '.join(parts)}.")
    skips = _check_fits(tuner.base, model.model.model_config.unet_config)
    sampling = model.get_model_object("model_sampling")
    active = ActiveTuner(
        tuner.eval().requires_grad_(False),
        weight,
        float(sampling.percent_to_sigma(start_percent)),
        float(sampling.percent_to_sigma(end_percent)),
        always=start_percent <= 0 and end_percent >= 1,
    )
    patched = model.clone()
    patches = patched.model_options["transformer_options"].get("patches", {}).get(_PATCHES, [])
    for position, patch in enumerate(patches):
        if isinstance(patch, SkipPatch):
            # The copy has a list of its own. Each tuner reads the feature without the residuals of the others.
            patches[position] = SkipPatch([*patch.tuners, active], skips)
            return patched
    patched.set_model_output_block_patch(SkipPatch([active], skips))
    return patched


def _check_fits(base: BaseInfo, config: Mapping[str, Any]) -> int:
    """Check a tuner's base against a U-Net config of ComfyUI, and return the number of skip connections."""
    ours = [base.sites[name].channels for name in base.skips]
    theirs = _skip_channels(config)
    text = (base.structure.get("cross_attention_dim"), config.get("context_dim"))
    if ours != theirs:
        raise BaseMismatchError(
            f"The tuner's base has skip connections of {ours} channels, but the model has {theirs}; "
            f"use a model of the same family."
        )
    if None not in text and text[0] != text[1]:
        raise BaseMismatchError(
            f"The tuner's base has text embeddings of width {text[0]}, but the model has {text[1]}; "
            f"use a model of the same family."
        )
    return len(ours)


def _skip_channels(config: Mapping[str, Any]) -> list[int]:
    """Return the channels of a U-Net's skip connections, shallow to deep."""
    width, multipliers, layers = (config.get(key) for key in ("model_channels", "channel_mult", "num_res_blocks"))
    if width is None or multipliers is None or layers is None:
        raise BaseMismatchError(
            "The model has no U-Net with skip connections; use a Stable Diffusion 1, 2 or XL model."
        )
    counts = [layers] * len(multipliers) if isinstance(layers, int) else list(layers)
    channels = [width]
    for level, (multiplier, count) in enumerate(zip(multipliers, counts, strict=True)):
        # Every level except the last ends in a downsampler, whose output is a skip feature too.
        channels += [width * multiplier] * (count + (level < len(counts) - 1))
    return channels
