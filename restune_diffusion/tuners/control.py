"""CSC-Tuner: control by condition images through the skip connections of a U-Net (SCEdit, arXiv 2312.11392)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..backbones import BaseInfo
from ..backbones.site_names import match_sites
from ..utils.autocast import as_input
from ..utils.errors import ConditionError
from .base import Features, Part
from .cascade import STEM_STRIDE, CascadeEncoder
from .configs import ControlConfig
from .skip import SkipTuner


class ControlPart(Part):
    """Part with an encoder and an SC-Tuner on every skip connection, for each condition.

    The residual at skip `j` is `sum_m alpha_m (T_j^m(x_j + c_j^m) + c_j^m)`. The features `c_j^m` depend only on the
    images: `encode` computes them once for all denoising steps.
    """

    def __init__(self, config: ControlConfig, base: BaseInfo) -> None:
        super().__init__()
        sites = {name: base.sites[name] for name in match_sites(["*"], base.skips)}
        self.conditions = config.conditions
        """Names of the conditions, in the order of their condition images."""
        self.channels = config.channels
        """Number of channels of the condition images."""
        self.taps = ()
        self.writes = tuple(sites)
        # Indexed by number, because the name of a condition may clash with an attribute of a module.
        self.encoders = nn.ModuleList(CascadeEncoder(sites, config) for _ in config.conditions)
        for name, site in sites.items():
            width = max(1, round(config.ratio * site.channels))
            self.register_site(name, nn.ModuleList(SkipTuner(site.channels, width) for _ in config.conditions))

    def encode(
        self, images: Sequence[torch.Tensor | None], size: tuple[int, int]
    ) -> tuple[dict[str, torch.Tensor], ...]:
        """Encode condition images to features for `Features.conditions`.

        Args:
            images: images of each condition, `(n, channels, height, width)` with values from 0 to 1, as diffusers
                passes them to a ControlNet, or None to leave the condition out. They are resized to eight times the
                size of the latent, normally the size of the generated image.
            size: height and width of the latent.

        Returns:
            Features of each condition by site, `(n, channels, height, width)`; empty for a condition left out.

        Raises:
            ConditionError: if the number of conditions or the shape of an image is wrong.
        """
        if len(images) != len(self.conditions):
            raise ConditionError(
                f"This tuner takes {len(self.conditions)} conditions ({', '.join(self.conditions)}), "
                f"but {len(images)} were given."
            )
        return tuple(
            {} if image is None else self._encoded(name, encoder, image, size)
            for name, encoder, image in zip(self.conditions, self.encoders, images, strict=True)
        )

    def forward(self, site: str, x: torch.Tensor, features: Features) -> torch.Tensor:
        """Return the residual for a skip feature and the features of the conditions.

        Raises:
            ConditionError: if there are no condition features.
        """
        if not features.conditions:
            raise ConditionError(
                f"A control tuner needs an image for {' or '.join(map(repr, self.conditions))}; "
                "give one, or set the tuner's weight to zero."
            )
        tuners = self.at_site[site]
        assert isinstance(tuners, nn.ModuleList)
        x = as_input(x, tuners[0].down.weight.dtype)  # type: ignore[union-attr, arg-type]
        total = torch.zeros_like(x)
        weights = features.condition_weights or (1.0,) * len(tuners)
        for tuner, levels, weight in zip(tuners, features.conditions, weights, strict=True):
            if levels and weight:
                total = total + weight * (tuner(x + levels[site]) + levels[site])
        return total

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize every encoder and tuner."""
        for encoder in self.encoders:
            assert isinstance(encoder, CascadeEncoder)
            encoder.reset_parameters(generator)
        for tuners in self.at_site.values():
            assert isinstance(tuners, nn.ModuleList)
            for tuner in tuners:
                assert isinstance(tuner, SkipTuner)
                tuner.reset_parameters(generator)

    def _encoded(
        self, name: str, encoder: nn.Module, image: torch.Tensor, size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        if image.dim() != 4 or image.shape[1] != self.channels:
            raise ConditionError(
                f"The condition {name!r} takes images of shape (n, {self.channels}, height, width), "
                f"but got {tuple(image.shape)}."
            )
        parameter = next(encoder.parameters())
        pixels = (size[0] * STEM_STRIDE, size[1] * STEM_STRIDE)
        image = image.to(parameter.device)
        if image.shape[-2:] != pixels:
            image = F.interpolate(image.float(), size=pixels, mode="bilinear", antialias=True)
        return encoder(image.to(parameter.dtype))
