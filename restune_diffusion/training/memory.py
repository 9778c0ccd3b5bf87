"""Memory options of a training run: gradient checkpointing and dropping the encoders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Attributes that diffusers sets on each module that supports gradient checkpointing.
_ATTRIBUTES = ("gradient_checkpointing", "_gradient_checkpointing_func")


@contextmanager
def gradient_checkpointing(base: Any, wanted: bool) -> Iterator[None]:
    """Context manager that enables gradient checkpointing of the base, if `wanted`, and restores it at the end.

    Tuners inside a checkpointed block run twice, with the same result.
    """
    if not wanted:
        yield
        return
    # Some classes hold the attribute for all instances; an instance has none of its own until it is set.
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
    """Remove all models except the denoiser from the pipeline, which cannot generate images afterwards."""
    models = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module) and name != "unet"]
    pipeline.register_modules(**dict.fromkeys(models))
