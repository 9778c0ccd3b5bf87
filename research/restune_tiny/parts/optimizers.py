"""Optimizers for parameters in one flat tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from research.restune_tiny.parts.flat import Flat


@dataclass
class Optimizers:
    """Adam, or Muon (https://kellerjordan.github.io/posts/muon) for matrices and kernels and Adam for the rest.

    Values, gradients and moments are views of flat tensors, so a checkpoint has four tensors in both cases.
    """

    parts: list[torch.optim.Optimizer]

    def step(self, lr: float) -> None:
        """Update the values from the gradients."""
        for part in self.parts:
            part.param_groups[0]["lr"] = lr
            part.step()


def new_optimizers(
    flat: Flat, values: Tensor, gradients: Tensor, moments: tuple[Tensor, Tensor], steps: int, muon: bool
) -> Optimizers:
    """Return optimizers over flat float32 tensors, with the state after a number of steps.

    Args:
        flat: layout of the parameters in the flat tensors.
        values: parameters, updated in place.
        gradients: gradients of each step.
        moments: first and second moments, zero before the first step, updated in place.
        steps: number of steps taken.
        muon: whether Muon optimizes matrices and kernels.
    """
    every = zip(*(flat.views(tensor).items() for tensor in (values, gradients, *moments)), strict=True)
    adams, muons, states = [], [], {}
    for (name, value), (_, gradient), (_, first), (_, second) in every:
        hidden = muon and is_hidden(name, value)
        shape = (len(value), -1) if hidden else value.shape
        parameter = nn.Parameter(value.detach().view(shape))
        parameter.grad = gradient.view(shape)
        if hidden:
            muons.append(parameter)
            states[parameter] = {"momentum_buffer": first.view(shape)}
        else:
            adams.append(parameter)
            states[parameter] = {"step": torch.tensor(float(steps)), "exp_avg": first, "exp_avg_sq": second}
    parts: list[torch.optim.Optimizer] = [torch.optim.Adam(adams, betas=(0.9, 0.99), fused=True)]
    if muons:  # with Adam's learning rates, since it changes a matrix by as much as Adam would
        parts.append(torch.optim.Muon(muons, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    for part in parts:
        for group in part.param_groups:
            part.state.update({parameter: states[parameter] for parameter in group["params"]})
    return Optimizers(parts)


def is_hidden(name: str, value: Tensor) -> bool:
    """Return whether a parameter maps features to features; first and last layers and embeddings stay with Adam."""
    return value.ndim >= 2 and not any(part in name for part in ("embedding", "conv_in.", "conv_out."))
