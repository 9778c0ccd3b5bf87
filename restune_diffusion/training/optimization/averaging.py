"""The moving average of a tuner's weights, which is smoother than any of its states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class TunerAverage:
    """Exponential moving average of the parameters, by diffusers' `EMAModel`.

    After `n` steps the average keeps `min(decay, n / (9 + n))` of itself, so that the start is soon forgotten.

    Args:
        tuner: its parameters are averaged, in their own dtype and on their device.
        decay: the share that is kept in the long run.
    """

    def __init__(self, tuner: nn.Module, decay: float) -> None:
        self._tuner = tuner
        self._model = EMAModel(tuner.parameters(), decay=decay)

    def update(self) -> None:
        """Take the tuner's present weights in."""
        self._model.step(self._tuner.parameters())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the tuner have the average as its weights meanwhile."""
        own = [parameter.detach().clone() for parameter in self._tuner.parameters()]
        self._model.copy_to(self._tuner.parameters())
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._tuner.parameters(), own, strict=True):
                    parameter.copy_(value)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the average by parameter name, on the CPU, and the settings and the count as plain values."""
        state = self._model.state_dict()
        names = [name for name, _ in self._tuner.named_parameters()]
        values = [value.to("cpu", copy=True).contiguous() for value in state.pop("shadow_params")]
        return dict(zip(names, values, strict=True)), state

    def load_state(self, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
        """Take over what `state` returned.

        Raises:
            KeyError: if a parameter's average is missing.
        """
        shadows = [tensors[name].to(parameter.device) for name, parameter in self._tuner.named_parameters()]
        self._model.load_state_dict({**settings, "shadow_params": shadows})
