"""One encoding of prompts by a pipeline whose tuners may have brought new words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..backbones import text_encoders
from ..hooks.placeholder_tokens import PlaceholderTokens
from ..hooks.text_encoders import EncoderHooks

if TYPE_CHECKING:
    from ..hooks.manager import TunerManager


@contextmanager
def prompts_read(pipeline: Any, manager: TunerManager | None) -> Iterator[None]:
    """Within, the pipeline's text encoders hear the tuners of one manager, and its tokenizers know their new words.

    The tokenizers themselves do not change: copies that know more are in their places meanwhile.

    Args:
        pipeline: a pipeline with `RestuneLoaderMixin`.
        manager: the tuners on its U-Net; None where there are none.
    """
    state = vars(pipeline)
    before = {key: state[key] for key in ("_new_words",) if key in state}
    found: list[PlaceholderTokens] = []
    with ExitStack() as stack:
        for encoder in text_encoders(pipeline).values():
            hooks = EncoderHooks.of(encoder.module)
            words = stack.enter_context(hooks.reading(manager, encoder)) if hooks is not None else None
            if words is not None:
                found.append(words)
                # Past the pipeline's own `__setattr__`, which would write the copy down in its config.
                stack.callback(state.__setitem__, encoder.tokenizer_name, encoder.tokenizer)
                state[encoder.tokenizer_name] = words.tokenizer
        if found:
            state["_new_words"] = tuple(found)
            stack.callback(state.update, before)
            stack.callback(state.pop, "_new_words", None)
        yield


def converted_prompt(prompt: str | list[str], tokenizer: Any, words: Sequence[PlaceholderTokens]) -> str | list[str]:
    """Write the new words in a prompt, or in several, as the tokenizer that is used knows them."""
    for known in words:
        if known.tokenizer is tokenizer:
            written = known.write([prompt] if isinstance(prompt, str) else prompt)
            return written[0] if isinstance(prompt, str) else written
    return prompt
