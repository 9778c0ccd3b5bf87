"""The optimizer, and which parameter it knows by which number."""

from __future__ import annotations

from typing import Any

import torch

from ..tuner import Tuner
from .config import TrainConfig


def make_optimizer(config: TrainConfig, tuner: Tuner) -> torch.optim.AdamW:
    """Make AdamW for all parameters of a tuner; those of the `text` part may have a learning rate of their own."""
    named = list(tuner.named_parameters())
    text = [parameter for name, parameter in named if name.startswith("text.")]
    others = [parameter for name, parameter in named if not name.startswith("text.")]
    rates = (config.learning_rate, config.text_learning_rate or config.learning_rate)
    groups = [{"params": chosen, "lr": rate} for chosen, rate in zip((others, text), rates, strict=True) if chosen]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def optimized_names(optimizer: Any, tuner: Tuner) -> list[str]:
    """Return the names of a tuner's parameters, in the order in which the optimizer's state numbers them."""
    names = {id(parameter): name for name, parameter in tuner.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
