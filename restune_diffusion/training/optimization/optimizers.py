"""Optimizers by name, of this package and from torch, transformers, bitsandbytes and lion-pytorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch

from ...utils.errors import TrainingError
from .prodigy import Prodigy

Parameters = Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]


def make_optimizer(name: str, parameters: Parameters, *, learning_rate: float, weight_decay: float) -> Any:
    """Return the optimizer of a name.

    Args:
        name: `adamw`, `adamw8bit`, `prodigy`, `adafactor` or `lion`.
        parameters: parameters to optimize, or parameter groups with their own learning rates.
        learning_rate: learning rate; for Prodigy, a factor on its adaptive rate.
        weight_decay: weight decay, decoupled from the gradient in all optimizers.

    Raises:
        TrainingError: if the optimizer's library is not installed.
    """
    optimizer: Any = _MAKERS[name](parameters, lr=learning_rate, weight_decay=weight_decay)
    return optimizer


def effective_learning_rate(optimizer: Any, scheduled: float) -> float | torch.Tensor:
    """Return the learning rate of the next step: the scheduled rate, times Prodigy's `d` (arXiv 2306.06101).

    It is a scalar on the device once Prodigy has computed it there.
    """
    rate: float | torch.Tensor = scheduled * optimizer.param_groups[0].get("d", 1.0)
    return rate


def _adamw(parameters: Parameters, **settings: Any) -> Any:
    groups: list[Any] = list(parameters)
    first = groups[0]["params"][0] if isinstance(groups[0], dict) else groups[0]
    # The fused kernel of CUDA skips an update with an overflow by itself; otherwise loss scaling waits before each.
    return torch.optim.AdamW(groups, fused=True if first.device.type == "cuda" else None, **settings)


def _adafactor(parameters: Parameters, **settings: Any) -> Any:
    adafactor = _library("adafactor", "transformers.optimization", "transformers").Adafactor
    # Rates relative to the size of a weight would hardly update weights that start at zero, which each tuner has.
    return adafactor(parameters, scale_parameter=False, relative_step=False, warmup_init=False, **settings)


def _adamw8bit(parameters: Parameters, **settings: Any) -> Any:
    return _library("adamw8bit", "bitsandbytes.optim", "bitsandbytes").AdamW8bit(parameters, **settings)


def _lion(parameters: Parameters, **settings: Any) -> Any:
    return _library("lion", "lion_pytorch", "lion-pytorch").Lion(parameters, **settings)


_MAKERS: dict[str, Callable[..., Any]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "prodigy": Prodigy,
    "adafactor": _adafactor,
    "lion": _lion,
}


def _library(name: str, module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise TrainingError(
            f"The optimizer {name} needs {package}; run pip install 'restune-diffusion[optimizers]', "
            f"or choose another optimizer."
        ) from error
