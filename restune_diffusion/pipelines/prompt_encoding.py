"""Prompt encoding by a pipeline whose tuners may have placeholder tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ..backbones import text_encoders
from ..hooks.manager import TunerManager
from ..hooks.placeholder_tokens import PlaceholderTokens
from ..hooks.text_encoders import EncoderHooks, text_part


@contextmanager
def prompt_encoding(pipeline: Any, manager: TunerManager | None) -> Iterator[None]:
    """Context manager that applies the tuners of one manager to a pipeline's text encoders and tokenizers.

    The tokenizers are not modified: inside the context the pipeline has copies with the placeholder tokens.

    Args:
        pipeline: a pipeline with `RestuneLoaderMixin`.
        manager: manager of the tuners on its U-Net; None if there are no tuners.
    """
    state = vars(pipeline)
    before = {key: state[key] for key in ("_placeholder_tokens",) if key in state}
    found: list[PlaceholderTokens] = []
    with ExitStack() as stack:
        for encoder in text_encoders(pipeline).values():
            hooks = EncoderHooks.of(encoder.module)
            tokens = stack.enter_context(hooks.reading(manager, encoder)) if hooks is not None else None
            if tokens is not None:
                found.append(tokens)
                # Bypasses the pipeline's `__setattr__`, which would register the copy in its config.
                stack.callback(state.__setitem__, encoder.tokenizer_name, encoder.tokenizer)
                state[encoder.tokenizer_name] = tokens.tokenizer
        if found:
            state["_placeholder_tokens"] = tuple(found)
            stack.callback(state.update, before)
            stack.callback(state.pop, "_placeholder_tokens", None)
        yield


def text_tuner_names(pipeline: Any) -> list[str]:
    """Return the names of the loaded tuners with a `text` part, whose weight all branches of a prompt share."""
    manager = TunerManager.of(pipeline.unet)
    return [] if manager is None else [name for name in manager.names if text_part(manager.tuner(name)) is not None]


def converted_prompt(prompt: str | list[str], tokenizer: Any, tokens: Sequence[PlaceholderTokens]) -> str | list[str]:
    """Replace the placeholder tokens in a prompt, or in several, by the tokens of the tokenizer in use."""
    for each in tokens:
        if each.tokenizer is tokenizer:
            converted = each.convert([prompt] if isinstance(prompt, str) else prompt)
            return converted[0] if isinstance(prompt, str) else converted
    return prompt
