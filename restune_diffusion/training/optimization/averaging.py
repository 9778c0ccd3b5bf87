"""Exponential moving average (EMA) of a tuner's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class TunerAverage:
    """Exponential moving average of a tuner's parameters, computed by diffusers' `EMAModel`.

    The decay at step `n` is `min(decay, n / (9 + n))`, so that the initial weights have little influence.

    Args:
        tuner: tuner whose parameters are averaged, in their dtype and on their device.
        decay: limit of the decay.
    """

    def __init__(self, tuner: nn.Module, decay: float) -> None:
        self._tuner = tuner
        self._model = EMAModel(tuner.parameters(), decay=decay)

    def update(self) -> None:
        """Update the average with the tuner's current weights."""
        self._model.step(self._tuner.parameters())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager that replaces the tuner's weights by the average, and restores them at the end."""
        own = [parameter.detach().clone() for parameter in self._tuner.parameters()]
        self._model.copy_to(self._tuner.parameters())
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._tuner.parameters(), own, strict=True):
                    parameter.copy_(value)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the average by parameter name, on the CPU, and the EMA settings and step count as plain values."""
        state = self._model.state_dict()
        names = [name for name, _ in self._tuner.named_parameters()]
        values = [value.to("cpu", copy=True).contiguous() for value in state.pop("shadow_params")]
        return dict(zip(names, values, strict=True)), state

    def load_state(self, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
        """Load a state returned by `state`.

        Raises:
            KeyError: if a parameter's average is missing.
        """
        shadows = [tensors[name].to(parameter.device) for name, parameter in self._tuner.named_parameters()]
        self._model.load_state_dict({**settings, "shadow_params": shadows})
