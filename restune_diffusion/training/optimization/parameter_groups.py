"""Parameter groups of a tuner with their learning rates, and parameter names in the order of the optimizer."""

from __future__ import annotations

from typing import Any

from ...tuners.tuner import Tuner
from ..config.optimizer import OptimizerConfig


def parameter_groups(config: OptimizerConfig, tuner: Tuner) -> list[dict[str, Any]]:
    """Split a tuner's parameters into groups; parts on text encoders may have their own learning rate."""
    text = [parameter for part in tuner.parts() if part.text_encoders for parameter in part.parameters()]
    others = [parameter for part in tuner.parts() if not part.text_encoders for parameter in part.parameters()]
    rates = (config.learning_rate, config.text_learning_rate or config.learning_rate)
    return [{"params": chosen, "lr": rate} for chosen, rate in zip((others, text), rates, strict=True) if chosen]


def optimized_names(optimizer: Any, tuner: Tuner) -> list[str]:
    """Return the names of a tuner's parameters, in the order of the indices in the optimizer's state."""
    names = {id(parameter): name for name, parameter in tuner.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
