"""The optimizers of a module whose parameters live in one flat tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from research.restune_tiny.parts.flat import Flat


@dataclass
class Optimizers:
    """Adam, or Muon (https://kellerjordan.github.io/posts/muon) for matrices and kernels and Adam for the rest.

    Values, gradients and moments are parts of flat tensors, so that a checkpoint holds four tensors either way.
    """

    parts: list[torch.optim.Optimizer]

    def step(self, lr: float) -> None:
        """Change the values by the gradients."""
        for part in self.parts:
            part.param_groups[0]["lr"] = lr
            part.step()


def new_optimizers(
    flat: Flat, values: Tensor, gradients: Tensor, moments: tuple[Tensor, Tensor], steps: int, muon: bool
) -> Optimizers:
    """Optimizers over flat float32 tensors that have taken some steps.

    Args:
        flat: says where in the flat tensors each parameter lies.
        values: what is trained, changed in place.
        gradients: where each step's gradients will lie.
        moments: first and second, of zeros before the first step, changed in place.
        steps: how many steps the moments come from.
        muon: whether matrices and kernels are Muon's.
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
    """Whether a parameter maps features to features: the first and last layers' and embeddings are left to Adam."""
    return value.ndim >= 2 and not any(part in name for part in ("embedding", "conv_in.", "conv_out."))
