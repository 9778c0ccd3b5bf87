"""What a training run may give up to need less memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# What diffusers sets on each module that can do so.
_ATTRIBUTES = ("gradient_checkpointing", "_gradient_checkpointing_func")


@contextmanager
def gradient_checkpointing(base: Any, wanted: bool) -> Iterator[None]:
    """Let the base compute its activations anew in the backward pass meanwhile, if wanted.

    Tuners inside a block that does so run twice, and give the same both times.
    """
    if not wanted:
        yield
        return
    # Some classes have the switch for all their instances, and then an instance has none until it is set.
    before = [
        (module, {name: module.__dict__[name] for name in _ATTRIBUTES if name in module.__dict__})
        for module in base.modules()
    ]
    base.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module, attributes in before:
            for name in _ATTRIBUTES:
                module.__dict__.pop(name, None)
            module.__dict__.update(attributes)


def drop_encoders(pipeline: Any) -> None:
    """Take every model but the denoiser out of the pipeline, which can draw no pictures any more."""
    models = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module) and name != "unet"]
    pipeline.register_modules(**dict.fromkeys(models))
