"""Let skip tuners act through ComfyUI's model patcher: one patch of the output blocks sums what all of them add.

ComfyUI's U-Net calls each output block patch as `patch(h, hsp, transformer_options)` before it joins the hidden state
`h` with the skip feature `hsp`; `transformer_options["block"]` is `("output", number)`, counted from the deepest
skip (`comfy/ldm/modules/diffusionmodules/openaimodel.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from restune_diffusion import BaseInfo, BaseMismatchError, RestuneError, Tuner
from restune_diffusion.tuners import Features, Part

_PATCHES = "output_block_patch"


@dataclass(frozen=True)
class ActiveTuner:
    """A tuner with its weight and the noise levels between which it acts."""

    tuner: Tuner
    weight: float
    sigma_start: float
    sigma_end: float
    always: bool
    """Whether it acts at every noise level, which need not be read then."""

    def acts(self, sigmas: torch.Tensor) -> bool:
        """Say whether the tuner acts at the noise levels of a batch, all of which are one step's."""
        if self.weight == 0:
            return False
        return self.always or self.sigma_end <= float(sigmas[0]) <= self.sigma_start

    def residual(self, site: str, skip: torch.Tensor) -> torch.Tensor:
        """Return what the tuner adds to a skip feature, in its dtype."""
        (part,) = self.tuner.parts()
        assert isinstance(part, Part)
        if site not in part.writes:
            return torch.zeros_like(skip)
        if self.tuner.device != skip.device:
            self.tuner.to(skip.device)
        return (self.weight * part(site, skip, Features())).to(skip.dtype)


class SkipPatch:
    """An output block patch: adds the residuals of all tuners, each made from the skip feature as it came in."""

    def __init__(self, tuners: Sequence[ActiveTuner], skips: int) -> None:
        self.tuners = tuple(tuners)
        self._skips = skips

    def __call__(
        self, h: torch.Tensor, hsp: torch.Tensor, transformer_options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden state as it is, and the tuned skip feature `(batch, channels, height, width)`."""
        _, number = transformer_options["block"]
        site, total = f"skip.{self._skips - 1 - number}", hsp
        for tuner in self.tuners:
            if tuner.acts(transformer_options["sigmas"]):
                total = total + tuner.residual(site, hsp)
        return h, total

    def __deepcopy__(self, memo: object) -> SkipPatch:
        # ComfyUI copies a model's options with the model; tuners have no state of their own to copy.
        return self

    def to(self, target: object) -> SkipPatch:
        """Move the tuners where ComfyUI moves the model; they keep their own dtype."""
        if isinstance(target, torch.device):
            for active in self.tuners:
                active.tuner.to(target)
        return self


def apply_tuner(model: Any, tuner: Tuner, weight: float, start_percent: float, end_percent: float) -> Any:
    """Return a copy of a model patcher on which a tuner acts, beside those that act already.

    Args:
        model: ComfyUI's `ModelPatcher` around a Stable Diffusion model.
        tuner: with a `skip` part and no other.
        weight: factor on the tuner's residuals.
        start_percent: from which share of the sampling on the tuner acts, 0 to 1.
        end_percent: up to which share.

    Raises:
        RestuneError: if the tuner has other parts.
        BaseMismatchError: if the model has another structure than the tuner's base.
    """
    kinds = [config.part for config in tuner.configs]
    if kinds != ["skip"]:
        raise RestuneError(f"ComfyUI can run tuners with a skip part alone, but this one has {', '.join(kinds)}.")
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
            # The copy's list is its own; each tuner must see the feature without what the others add.
            patches[position] = SkipPatch([*patch.tuners, active], skips)
            return patched
    patched.set_model_output_block_patch(SkipPatch([active], skips))
    return patched


def _check_fits(base: BaseInfo, config: Mapping[str, Any]) -> int:
    """Compare a tuner's base with a U-Net's settings in ComfyUI; return the number of skip connections."""
    ours = [base.sites[name].channels for name in base.skips]
    theirs = _skip_channels(config)
    text = (base.structure.get("cross_attention_dim"), config.get("context_dim"))
    if ours != theirs:
        raise BaseMismatchError(f"This tuner is for skip connections of {ours} channels, but the model has {theirs}.")
    if None not in text and text[0] != text[1]:
        raise BaseMismatchError(
            f"This tuner is for a base with text states of width {text[0]}, but the model's have {text[1]}."
        )
    return len(ours)


def _skip_channels(config: Mapping[str, Any]) -> list[int]:
    """Return the channels of a U-Net's skip connections, shallow to deep."""
    width, multipliers, layers = (config.get(key) for key in ("model_channels", "channel_mult", "num_res_blocks"))
    if width is None or multipliers is None or layers is None:
        raise BaseMismatchError("This model has no U-Net with skip connections, as Stable Diffusion 1, 2 and XL have.")
    counts = [layers] * len(multipliers) if isinstance(layers, int) else list(layers)
    channels = [width]
    for level, (multiplier, count) in enumerate(zip(multipliers, counts, strict=True)):
        # Every level but the last ends in a downsampler, which makes a skip feature too.
        channels += [width * multiplier] * (count + (level < len(counts) - 1))
    return channels
