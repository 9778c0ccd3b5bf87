"""What a training run may give up to need less memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

_SWITCH, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


@contextmanager
def gradient_checkpointing(base: Any, wanted: bool) -> Iterator[None]:
    """Let the base compute its activations anew in the backward pass meanwhile, if wanted.

    Tuners inside a block that does so run twice, and give the same both times.
    """
    if not wanted:
        with nullcontext():
            yield
        return
    before = [
        (module, getattr(module, _SWITCH), module.__dict__.get(_FUNCTION))
        for module in base.modules()
        if hasattr(module, _SWITCH)
    ]
    base.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module, switch, function in before:
            setattr(module, _SWITCH, switch)
            if function is not None:
                setattr(module, _FUNCTION, function)
            else:
                module.__dict__.pop(_FUNCTION, None)


def drop_encoders(pipeline: Any) -> None:
    """Take every model but the denoiser out of the pipeline, which can draw no pictures any more."""
    models = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module) and name != "unet"]
    pipeline.register_modules(**dict.fromkeys(models))
