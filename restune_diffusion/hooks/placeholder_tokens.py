"""Placeholder tokens in prompts: a copy of the tokenizer with the tokens, and the conversion of prompts for it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..utils.errors import RestuneError

# First character of Unicode's private use plane 15, which has no meaning in prompts.
_FIRST = 0xF0000


@dataclass(frozen=True)
class PlaceholderToken:
    """Placeholder token of a tuner.

    Args:
        token: the token as written in prompts.
        tuner: name of the tuner.
        vectors: number of embedding vectors of the token.
        factors: function from the number of prompts to the tuner's factor on each prompt, or one common factor.
    """

    token: str
    tuner: str
    vectors: int
    factors: Callable[[int], tuple[float, ...]]


class PlaceholderTokens:
    """Placeholder tokens that the prompts of one call may use.

    The pipeline's tokenizer is not modified. In `tokenizer`, a copy, each vector is a private character with its own
    id, so that a placeholder token is replaced only in the prompts on which its tuner acts.

    Args:
        tokenizer: the pipeline's tokenizer.
        tokens: the placeholder tokens, in the order of their vectors.
        copies: cache of the tokenizer's copy.
    """

    def __init__(self, tokenizer: Any, tokens: Sequence[PlaceholderToken], copies: TokenizerCopy) -> None:
        self.first_id = len(tokenizer)
        """Id of the first vector; the ids of the others follow."""
        self.tokenizer = copies.of(tokenizer, sum(token.vectors for token in tokens))
        self._tokens = []
        place = _FIRST
        for token in tokens:
            self._tokens.append((token, "".join(map(chr, range(place, place + token.vectors)))))
            place += token.vectors

    def convert(self, prompts: Sequence[str]) -> list[str]:
        """Replace, in each prompt, the placeholder tokens of the tuners that act on it by private characters.

        Raises:
            RestuneError: if two tuners that act on one prompt have the same placeholder token.
        """
        factors = [token.factors(len(prompts)) for token, _ in self._tokens]
        return [
            self._converted(prompt, [each[row % len(each)] for each in factors]) for row, prompt in enumerate(prompts)
        ]

    def _converted(self, prompt: str, factors: Sequence[float]) -> str:
        active: dict[str, tuple[str, str]] = {}
        for (each, private), factor in zip(self._tokens, factors, strict=True):
            if not factor or not _pattern([each.token]).search(prompt):
                continue
            other, _ = active.setdefault(each.token.lower(), (each.tuner, private))
            if other != each.tuner:
                raise RestuneError(
                    f"The tuners {other!r} and {each.tuner!r} both have the placeholder token {each.token}; activate "
                    "only one of them."
                )
        if not active:
            return prompt
        # Some letters, such as a dotless i, match a letter that is not their lower case; these are not the token.
        return _pattern(active).sub(lambda match: active.get(match[0].lower(), ("", match[0]))[1], prompt)


def contains_token(text: str, tokens: Sequence[str]) -> bool:
    """Return whether a text contains one of the placeholder tokens."""
    return bool(_pattern(tokens).search(text))


def split_tokens(text: str, tokens: Sequence[str]) -> tuple[str, list[str]]:
    """Return a text without its placeholder tokens, and the tokens in lower case, each as often as it occurs."""
    if not tokens:
        return text, []
    pattern = _pattern(tokens)
    return pattern.sub(" ", text), [match[0].lower() for match in pattern.finditer(text)]


def _pattern(tokens: Sequence[str] | dict[str, Any]) -> re.Pattern[str]:
    """Return a pattern for whole tokens, the longest first, ignoring case like CLIP's tokenizer."""
    ordered = sorted(tokens, key=len, reverse=True)
    # `sks` does not match in `asks`, but `<dog>` matches in `a<dog>s`.
    ends = [(r"(?<!\w)" if t[0].isalnum() else "", r"(?!\w)" if t[-1].isalnum() else "") for t in ordered]
    return re.compile(
        "|".join(f"{left}{re.escape(token)}{right}" for token, (left, right) in zip(ordered, ends, strict=True)),
        re.IGNORECASE,
    )


class TokenizerCopy:
    """Cached copy of a tokenizer with private characters as tokens; creating one takes half a second."""

    def __init__(self) -> None:
        self._kept: tuple[Any, int, int] | None = None
        self._copy: Any = None

    def of(self, tokenizer: Any, count: int) -> Any:
        """Return a copy of a tokenizer with `count` private characters as additional tokens."""
        made_from = (tokenizer, len(tokenizer), count)
        if self._kept is None or self._kept[0] is not tokenizer or self._kept[1:] != made_from[1:]:
            from transformers import AddedToken

            self._copy = copy.deepcopy(tokenizer)
            self._copy.add_tokens([AddedToken(chr(_FIRST + number), normalized=False) for number in range(count)])
            self._kept = made_from
        return self._copy
