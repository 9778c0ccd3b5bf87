"""Text encoders of a pipeline: lookup and structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..utils.errors import RestuneError
from .description import TextInfo
from .transformer_block import linear_layers

_NAMES = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder with its tokenizer.

    Args:
        module: transformers' `CLIPTextModel` or `CLIPTextModelWithProjection`.
        tokenizer: the tokenizer of the encoder.
        tokenizer_name: name of the tokenizer in the pipeline.
        compiled: whether the encoder is compiled; hooks registered afterwards have no effect.
    """

    module: nn.Module
    tokenizer: Any
    tokenizer_name: str = "tokenizer"
    compiled: bool = False


def text_encoders(pipeline: Any) -> dict[str, TextEncoder]:
    """Return the loaded text encoders of a pipeline, by name."""
    found = {}
    for name, tokenizer_name in _NAMES.items():
        module, tokenizer = getattr(pipeline, name, None), getattr(pipeline, tokenizer_name, None)
        if isinstance(module, nn.Module) and tokenizer is not None:
            inside = getattr(module, "_orig_mod", module)
            compiled = inside is not module or getattr(module, "_compiled_call_impl", None) is not None
            found[name] = TextEncoder(inside, tokenizer, tokenizer_name, compiled)
    return found


def describe_text(encoders: Mapping[str, TextEncoder]) -> dict[str, TextInfo]:
    """Return the structure of text encoders.

    Raises:
        RestuneError: if one is not a CLIP text encoder.
    """
    described = {}
    for name, encoder in encoders.items():
        layers = text_stack(encoder.module, name).encoder.layers
        described[name] = TextInfo(
            hidden_size=encoder.module.config.hidden_size,  # type: ignore[union-attr, arg-type]
            num_hidden_layers=len(layers),
            # Excludes placeholder tokens that Textual Inversion has added to tokenizer and encoder.
            vocab_size=encoder.tokenizer.vocab_size,
            linears=dict(linear_layers(layers[0])),
        )
    return described


def text_stack(encoder: nn.Module, name: str = "text_encoder") -> Any:
    """Return the module inside a text encoder that has `embeddings` and `encoder.layers`.

    Raises:
        RestuneError: if there is no such module.
    """
    # Whether a wrapper class has it as `text_model` depends on the version of transformers.
    stack = getattr(encoder, "text_model", encoder)
    if not hasattr(stack, "embeddings") or not hasattr(getattr(stack, "encoder", None), "layers"):
        raise RestuneError(f"Tuners support CLIP text encoders, but `{name}` is a {type(encoder).__name__}.")
    return stack
