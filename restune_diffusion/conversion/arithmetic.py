"""Arithmetic on tuners: weighted sums and averages of several tuners, and rank reduction of LoRA.

Exactness:

- A sum of residuals is exact for tuners with a single part that is `skip` or only LoRA: the bottlenecks are
  concatenated, `W_up = [c_1 W_up1, c_2 W_up2]` and `W_down = [W_down1; W_down2]`, so the file grows.
- An average is exact for LoRA, whose residual is linear in the product of its weights: the average of two tuners is
  the average of their residuals, again with concatenated ranks, which an SVD can then reduce.
- For every other part the weights are averaged. The size stays the same, but this is a heuristic: the residual of the
  averaged weights is not the average of the residuals, although often close to it for tuners that were trained from
  the same initialization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch

from ..tuners.configs import PartConfig, ResConfig, TextConfig
from ..tuners.tuner import Tuner
from ..utils.errors import RestuneError
from .lora_folding import LoraLayer
from .lora_layers import lora_layers, lora_tuner
from .products.reduction import Reduction
from .skip_layers import SkipLayer, skip_layers, skip_tuner

Method: TypeAlias = Literal["average", "interpolate", "add", "subtract", "stack"]
"""Merge method. `average`: `sum w_i T_i / sum w_i`. `interpolate`: `(1 - w) A + w B` with the second weight `w`. `add`
and `stack` (the same, named after the implementation): `sum w_i T_i`. `subtract`: the first minus all others."""


def merge_tuners(tuners: Sequence[Tuner], weights: Sequence[float], method: Method = "average") -> Tuner:
    """Merge several tuners into one.

    Args:
        tuners: tuners for bases of the same structure.
        weights: one factor per tuner.
        method: how to combine them.

    Returns:
        A tuner on the CPU, in the widest dtype of the tuners, or in fp32 if a half precision cannot represent the
        weighted values exactly.

    Raises:
        RestuneError: if the method does not support the number of tuners, their weights or their parts.
        BaseMismatchError: if the tuners are for bases of different structures.
    """
    factors = _factors(weights, method)
    if len(factors) != len(tuners) or not tuners:
        raise RestuneError(f"There are {len(tuners)} tuners but {len(factors)} weights; give one weight per tuner.")
    for other in tuners[1:]:
        _check_same_structure(tuners[0], other)
    if all(_is_lora(tuner) for tuner in tuners):
        return _sum_of_loras(tuners, factors)
    if method in ("average", "interpolate"):
        return _mean_of_weights(tuners, factors)
    if all([config.part for config in tuner.configs] == ["skip"] for tuner in tuners):
        return _sum_of_skips(tuners, factors)
    raise RestuneError(
        f"The method {method!r} supports skip tuners, or res tuners with only lora; set weights for several tuners "
        "when generating instead, or average tuners with the same config."
    )


def reduce_rank(tuner: Tuner, rank: int) -> tuple[Tuner, float]:
    """Reduce the rank of each LoRA layer by a truncated singular value decomposition, the best approximation.

    Args:
        tuner: a `res` tuner with only LoRA.
        rank: largest rank of a layer.

    Returns:
        The tuner, in fp32 or wider, and the fraction of the layers' squared Frobenius norm that it keeps, from 0 to 1.

    Raises:
        RestuneError: if the rank is not positive, or the tuner contains anything but LoRA.
    """
    reduction = Reduction(rank)
    return reduced(tuner, reduction), reduction.kept


def reduced(tuner: Tuner, reduction: Reduction) -> Tuner:
    """Return a tuner with only LoRA whose layers are reduced, in fp32 or wider."""
    layers = {site: reduction(layer) for site, layer in lora_layers(tuner).items()}
    return lora_tuner(layers, tuner.base, tuner.metadata, "The tuner")


def _factors(weights: Sequence[float], method: Method) -> list[float]:
    if not all(map(math.isfinite, weights)):
        raise RestuneError(f"Weights must be finite numbers, but are {list(weights)}.")
    if method == "interpolate":
        if len(weights) != 2:
            raise RestuneError(f"Interpolation needs exactly two tuners, but {len(weights)} are given.")
        return [1 - weights[1], weights[1]]
    if method == "subtract":
        return [weights[0], *(-weight for weight in weights[1:])]
    if method == "average":
        if abs(sum(weights)) < 1e-12:
            raise RestuneError("The weights of an average sum to zero; their sum must not be zero.")
        return [weight / sum(weights) for weight in weights]
    return list(weights)


def _check_same_structure(one: Tuner, other: Tuner) -> None:
    """Raise `BaseMismatchError` unless two tuners are for bases of the same structure at the sites of both."""
    known = one.base.sites.keys() & other.base.sites.keys()
    one.base.narrowed(known).check_fits(other.base)
    one.base.check_text_fits(other.base.text)


def _is_lora(tuner: Tuner) -> bool:
    (config, *others) = tuner.configs
    return isinstance(config, ResConfig) and not others and set(config.operations.values()) == {"lora"}


def _sum_of_loras(tuners: Sequence[Tuner], factors: Sequence[float]) -> Tuner:
    of_each = [lora_layers(tuner) for tuner in tuners]
    stacked = {}
    for site in dict.fromkeys(site for layers in of_each for site in layers):
        present = [(layers[site], factor) for layers, factor in zip(of_each, factors, strict=True) if site in layers]
        up = _concatenated([(layer.up, factor * layer.factor) for layer, factor in present], dim=1)
        down = torch.cat([layer.down.to(up.dtype) for layer, _ in present])
        stacked[site] = LoraLayer(down, up, float(down.shape[0]))
    sites = {name: site for tuner in tuners for name, site in tuner.base.sites.items()}
    return lora_tuner(stacked, tuners[0].base.model_copy(update={"sites": sites}), {}, "The sum")


def _sum_of_skips(tuners: Sequence[Tuner], factors: Sequence[float]) -> Tuner:
    of_each = [skip_layers(tuner) for tuner in tuners]
    stacked = {}
    for site in dict.fromkeys(site for layers in of_each for site in layers):
        present = [(layers[site], factor) for layers, factor in zip(of_each, factors, strict=True) if site in layers]
        up = _concatenated([(layer.up, factor) for layer, factor in present], dim=1)
        bias = torch.stack([layer.up_bias.double() * factor for layer, factor in present]).sum(0).to(up.dtype)
        down = torch.cat([layer.down.to(up.dtype) for layer, _ in present])
        down_bias = torch.cat([layer.down_bias.to(up.dtype) for layer, _ in present])
        stacked[site] = SkipLayer(down, down_bias, up, bias)
    return skip_tuner(stacked, tuners[0].base, {}, "The sum")


def _concatenated(pieces: Sequence[tuple[torch.Tensor, float]], dim: int) -> torch.Tensor:
    """Scale and concatenate tensors, in a dtype that represents the scaled values exactly, or fp32."""
    dtype = pieces[0][0].dtype
    for tensor, _ in pieces[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    exact = [tensor.double() * factor for tensor, factor in pieces]
    if any(not torch.equal(value.to(dtype).double(), value) for value in exact):
        dtype = torch.promote_types(dtype, torch.float32)
    return torch.cat([value.to(dtype) for value in exact], dim)


def _mean_of_weights(tuners: Sequence[Tuner], factors: Sequence[float]) -> Tuner:
    first = tuners[0]
    for config, other in ((config, other) for tuner in tuners for config, other in _paired(first, tuner)):
        if config != other:
            raise RestuneError(f"Only tuners with the same config can be averaged; {_difference(config, other)}.")
        lora = isinstance(config, ResConfig) and "lora" in config.operations.values()
        if lora or (isinstance(config, TextConfig) and config.rank):
            raise RestuneError(
                "The average of LoRA is that of its products, which needs tuners with only lora; set weights for "
                "these tuners when generating instead."
            )
    states = [tuner.state_dict() for tuner in tuners]
    merged = Tuner.empty(first.configs, first.base)
    mean = {}
    for key, value in states[0].items():
        dtype = value.dtype
        total = torch.zeros(value.shape, dtype=torch.float64)
        for state, factor in zip(states, factors, strict=True):
            dtype = torch.promote_types(dtype, state[key].dtype)
            total += factor * state[key].cpu().double()
        mean[key] = total.to(dtype)
    merged.load_state_dict(mean, assign=True)
    return merged


def _paired(one: Tuner, other: Tuner) -> list[tuple[object, object]]:
    if len(one.configs) != len(other.configs):
        return [([config.part for config in one.configs], [config.part for config in other.configs])]
    return list(zip(one.configs, other.configs, strict=True))


def _difference(one: object, other: object) -> str:
    """Describe the first setting in which two configs differ."""
    if type(one) is type(other) and isinstance(one, PartConfig) and isinstance(other, PartConfig):
        ours, theirs = one.model_dump(), other.model_dump()
        name = next(name for name in ours if ours[name] != theirs[name])
        return f"one has {name} = {ours[name]}, another {theirs[name]}"
    return f"one has {one}, another {other}"
