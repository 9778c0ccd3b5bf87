"""Methods to train a task on a pretrained vision transformer, in the order of the paper's table."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from restune_diffusion import BypassConfig, ResConfig, Tuner, attach

from .backbone import read_out


@dataclass(frozen=True)
class Learner:
    """A prepared backbone, its feature function (N x 3 x S x S to N x width) and its parameters besides the head."""

    backbone: nn.Module
    features: Callable[[Tensor], Tensor]
    trained: list[nn.Parameter]
    tuner: Tuner | None = None


Build = Callable[[Any, torch.Generator], Any]
"""Function of a frozen `ViTModel` and a random generator to a context manager that yields a `Learner`."""


@dataclass(frozen=True)
class Method:
    """A method: function that prepares the backbone, and learning rates to try."""

    build: Build
    rates: tuple[float, ...]


class LayerMix(nn.Module):
    """The paper's bypass without tuners: `b_l = lam_l x_l + (1 - lam_l) b_{l-1}`, `b_0 = x_0`, H and V the identity.

    Args:
        layers: number of layers of the backbone.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(layers))

    def forward(self, states: tuple[Tensor, ...]) -> Tensor:
        """Return the mix of `layers + 1` states of one shape."""
        mixed = states[0]
        for state, lam in zip(states[1:], torch.sigmoid(self.logits), strict=True):
            mixed = lam * state + (1 - lam) * mixed
        return mixed


@contextmanager
def linear_probe(vit: Any, generator: torch.Generator) -> Iterator[Learner]:
    """Train only the head."""
    yield Learner(vit, partial(read_out, vit), [])


@contextmanager
def layer_mix(vit: Any, generator: torch.Generator) -> Iterator[Learner]:
    """Train the head on a learned average of all layers, through the frozen last norm."""
    mix = LayerMix(vit.config.num_hidden_layers)
    states: list[Tensor] = []

    # Not `output_hidden_states`: transformers would add hooks to the model and leave them there.
    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        states.append(output)

    def features(images: Tensor) -> Tensor:
        states.clear()
        vit(images * 2 - 1)
        normed: Tensor = vit.layernorm(mix(tuple(states)))
        return normed.mean(1)

    handles = [module.register_forward_hook(keep) for module in (vit.embeddings, *vit.layers)]
    try:
        yield Learner(vit, features, list(mix.parameters()))
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def tuned(config: BypassConfig | ResConfig, vit: Any, generator: torch.Generator) -> Iterator[Learner]:
    """Train a new tuner that is attached to the backbone."""
    tuner = Tuner.for_base(vit, config, generator=generator)
    with attach(vit, tuner):
        yield Learner(vit, partial(read_out, vit), list(tuner.parameters()), tuner)


@contextmanager
def full(vit: Any, generator: torch.Generator) -> Iterator[Learner]:
    """Train a copy of the whole backbone."""
    mine = copy.deepcopy(vit).requires_grad_(True)
    yield Learner(mine, partial(read_out, mine), list(mine.parameters()))


SMALL = (1e-3, 3e-3, 1e-2)
BYPASS = "bypass"
METHODS: dict[str, Method] = {
    "linear probe": Method(linear_probe, SMALL),
    "bypass without tuners": Method(layer_mix, SMALL),
    BYPASS: Method(partial(tuned, BypassConfig()), SMALL),
    "bypass, ratio 0.125": Method(partial(tuned, BypassConfig(ratio=0.125)), SMALL),
    "lora r=8": Method(partial(tuned, ResConfig(self_attention="lora", feed_forward="lora", width=8)), SMALL),
    "dual res, prefix + adapter": Method(partial(tuned, ResConfig(self_attention="prefix", width=10)), SMALL),
    "dual res, adapter + adapter": Method(partial(tuned, ResConfig(width=10)), SMALL),
    "full fine-tuning": Method(full, (3e-4, 1e-3, 3e-3)),
}
