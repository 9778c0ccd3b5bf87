"""Conditioning on an earlier layer of the text encoder (clip skip)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from ..backbones import text_stack
from ..utils.errors import RestuneError


def clip_skip_arguments(pipeline: Any, clip_skip: int) -> dict[str, Any]:
    """Prepare a pipeline for a clip skip, and return the arguments that its calls need.

    Args:
        pipeline: the pipeline; hooks on its text encoder stay until it is discarded.
        clip_skip: number of the layer from the last, as in A1111 and sd-scripts: 1 is the last, 2 the one before.

    Raises:
        RestuneError: if the text encoder has no such layer.
    """
    # XL is trained on the layer before the last, and diffusers counts from there.
    first = 2 if getattr(pipeline, "text_encoder_2", None) is not None else 1
    layers = pipeline.text_encoder.config.num_hidden_layers
    if not first <= clip_skip <= layers:
        raise RestuneError(
            f"A clip skip of {clip_skip} does not fit this base; use a number from {first} to {layers}."
        )
    if clip_skip == first:
        return {}
    if first == 2:
        return {"clip_skip": clip_skip - first}
    # diffusers' `clip_skip` fails on the encoders of transformers 5 and leaves out the negative prompt, unlike A1111.
    encoder = pipeline.text_encoder
    encoder.register_forward_pre_hook(_show_layers, with_kwargs=True)
    encoder.register_forward_hook(partial(_earlier_layer, clip_skip))
    return {}


def _show_layers(encoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "output_hidden_states": True, "return_dict": True}


def _earlier_layer(clip_skip: int, encoder: nn.Module, args: Any, output: Any) -> Any:
    stack: Any = text_stack(encoder)
    output.last_hidden_state = stack.final_layer_norm(output.hidden_states[-clip_skip])
    return output
