"""Consistency between two noisy passes of a tuner, a regularizer against overfitting (PACE, arXiv 2409.17137).

    h_l = h_l^base + z_l * delta_l,   z_l ~ N(1, sigma_l^2) per sample and channel,   sigma_l = sigma (n - l) / n
    loss = task loss of draw 1 + lambda * mean |f_1 - f_2|^2

`delta_l` is the tuner's output at depth `l = 0 .. n - 1`, and `f_1`, `f_2` are the predictions with two draws of all
`z_l`. This is the paper's method as its authors' code computes it. Two things differ: the square is averaged over the
prediction, so that lambda does not depend on the resolution, where they sum over the logits; and their first block of
a ViT has no noise. Noise exists in training only. The file is that of an ordinary tuner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...backbones import BaseInfo
from ...backbones.site_names import OUT, SiteName, of_family
from ...tuners.base import Part
from ...tuners.tuner import Tuner
from ...utils.seeds import seeded
from ..distillation.loss import sample_losses, teacher_prediction
from ..feature_cache.shared_pass import features_of, tapped_by
from ..feature_cache.tap_features import TapFeatures
from ..latents.batches import Batch
from ..state import ImageLoss, TrainState
from ..transfers.to_device import to_device
from .prediction import predict, tuners_disabled


class TunerNoise:
    """Multiplicative noise on the outputs of a tuner; they are unchanged outside `applied`.

    The outputs are the residuals of a part at its sites. Those of a side network, which writes at one site, are the
    outputs of its stages.

    Args:
        tuner: the tuner.
        sigma: standard deviation at the least depth; it falls linearly with depth, separately in each part.
    """

    def __init__(self, tuner: Tuner, sigma: float) -> None:
        self._sigmas: list[tuple[nn.Module, dict[str, float] | float]] = []
        for part in tuner.parts():
            if part.writes == (OUT,) and part.at_site:
                falling = falling_sigmas(list(part.at_site), sigma)
                self._sigmas += [(stage, falling[site]) for site, stage in part.at_site.items()]
            elif part.writes:
                self._sigmas.append((part, sigmas_by_site(part, tuner.base, sigma)))

    @contextmanager
    def applied(self, generators: Sequence[torch.Generator]) -> Iterator[None]:
        """Context manager in which the outputs are noisy.

        Args:
            generators: one generator for each row of the batch. Its numbers are used in the order of the forward pass,
                so that the noise of a row does not depend on the others.
        """
        with ExitStack() as stack:
            for module, sigma in self._sigmas:
                handle = module.register_forward_hook(_noise_hook(sigma, generators))
                stack.callback(handle.remove)
            yield


def _noise_hook(sigma: dict[str, float] | float, generators: Sequence[torch.Generator]) -> Callable[..., torch.Tensor]:
    def multiply(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        # The first argument of a part is the site.
        own = sigma[args[0]] if isinstance(sigma, dict) else sigma
        axis = 1 if output.dim() == 4 else -1
        drawn = torch.stack([torch.randn(output.shape[axis], generator=generator) for generator in generators])
        factor = to_device(1 + own * drawn, output.device, output.dtype)
        shape = [len(generators), *[1] * (output.dim() - 1)]
        shape[axis] = output.shape[axis]
        return output * factor.view(shape)

    return multiply


def falling_sigmas(depths: Sequence[str], sigma: float) -> dict[str, float]:
    """Return the standard deviation at each depth, from `sigma` at the first to `sigma / n` at the last."""
    count = len(depths)
    return {depth: sigma * (count - number) / count for number, depth in enumerate(depths)}


def sigmas_by_site(part: Part, base: BaseInfo, sigma: float) -> dict[str, float]:
    """Return the standard deviation at each site that a part writes to.

    The depth is that at which a residual enters the forward pass. Residuals of one transformer block or group of
    layers have one depth. Skip connections enter the decoder from the deepest to the shallowest.
    """
    order = {site: number for number, site in enumerate(base.sites)}
    place = {site: SiteName.parse(site).place if site not in base.stations else site for site in part.writes}
    first: dict[str, int] = {}
    for site, block in place.items():
        known = order[site] if site in order else order[SiteName.parse(site).operation_site]
        first[block] = min(known, first.get(block, known))
    blocks = sorted(first, key=first.__getitem__)
    skips = of_family(blocks, "skip")
    rest = [block for block in blocks if block not in skips]
    falling = falling_sigmas([*reversed(skips), *rest], sigma)
    return {site: falling[block] for site, block in place.items()}


class Consistency(ImageLoss):
    """Loss of the images on the first of two noisy passes, plus the weighted distance between both.

    Both passes are the halves of one batch. For a tuner that writes only at the output head, the base's blocks run
    once, without the tuner, for both.

    Args:
        tuner: the tuner in training.
        weight: factor of the distance; 0 trains with the noise alone.
        sigma: see `TunerNoise`.
        seed: seed of the run.
    """

    def __init__(self, tuner: Tuner, weight: float, sigma: float, seed: int) -> None:
        self._noise = TunerNoise(tuner, sigma)
        self._weight, self._sigma, self._seed = weight, sigma, seed

    def describe(self) -> str:
        """Return a line with the weight and the noise."""
        return f"consistency weight {self._weight:g}, noise of sigma {self._sigma:g}: two predictions in each step"

    def loss(self, run: TrainState, batch: Batch, number: int) -> torch.Tensor:
        """Return the loss of a batch."""
        rows = len(batch.latents)
        taught = teacher_prediction(run, batch)
        twice = doubled(_with_features(run, batch))
        first = number * rows
        # By the position of each sample, as its other random numbers, so that batches can be split.
        generators = [
            seeded(self._seed, "consistency", 2 * (first + row) + draw) for draw in range(2) for row in range(rows)
        ]
        with self._noise.applied(generators):
            one, two = predict(run, twice).float().chunk(2)
        losses = sample_losses(run, batch, one, taught)
        run.bands.add(losses, batch.timesteps)
        return losses.mean() + self._weight * (one - two).square().mean()


def _with_features(run: TrainState, batch: Batch) -> Batch:
    """Add the features of the base to a batch for a tuner that needs no others, unless it has them."""
    if batch.features is not None or not run.config.learns_from_features:
        return batch
    with tuners_disabled(run.pipeline.unet):
        return replace(batch, features=features_of(run, tapped_by([run]), batch))


def doubled(batch: Batch) -> Batch:
    """Return a batch with each row twice: first all rows, then all again."""
    if batch.features is not None:
        # The other inputs of the base have been used.
        return replace(batch, features=_twice(batch.features))
    names = ("latents", "noise", "timesteps", "inputs", "conditions", "perturbation", "mask", "inpainting")
    return replace(batch, **{name: _twice(getattr(batch, name)) for name in names})


def _twice(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value])
    if isinstance(value, tuple):
        return tuple(map(_twice, value))
    if isinstance(value, dict):
        return {name: _twice(each) for name, each in value.items()}
    if isinstance(value, TapFeatures):
        return replace(value, by_site=_twice(dict(value.by_site)), time=_twice(value.time))
    return value
