"""New words in prompts: a copy of the tokenizer that knows them, and how a prompt is written for it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..utils.errors import RestuneError

# The first character of the plane that Unicode leaves to private use: no prompt means anything by it.
_FIRST = 0xF0000


@dataclass(frozen=True)
class PlaceholderToken:
    """A word that a tuner brings.

    Args:
        token: the word, as it is written in prompts.
        tuner: name of the tuner.
        vectors: number of vectors that stand for it.
        factors: how strongly the tuner acts on each of so many prompts, or one number where that is the same.
    """

    token: str
    tuner: str
    vectors: int
    factors: Callable[[int], tuple[float, ...]]


class PlaceholderTokens:
    """The new words that prompts of one call may use.

    The pipeline's own tokenizer stays as it is. In `tokenizer`, a copy, each vector is a private character with an id
    of its own, so that a word means something only in the prompts on which its tuner acts.

    Args:
        tokenizer: the pipeline's tokenizer.
        words: the words, in the order of their vectors.
        copies: where the copy comes from.
    """

    def __init__(self, tokenizer: Any, words: Sequence[PlaceholderToken], copies: TokenizerCopy) -> None:
        self.first_id = len(tokenizer)
        """Id of the first vector; those of the others follow."""
        self.tokenizer = copies.of(tokenizer, sum(word.vectors for word in words))
        self._words = []
        place = _FIRST
        for word in words:
            self._words.append((word, "".join(map(chr, range(place, place + word.vectors)))))
            place += word.vectors

    def write(self, prompts: Sequence[str]) -> list[str]:
        """Replace the words of the tuners that act on each prompt by what the tokenizer knows.

        Raises:
            RestuneError: if two tuners that act on one prompt bring the same word.
        """
        factors = [word.factors(len(prompts)) for word, _ in self._words]
        return [
            self._written(prompt, [each[row % len(each)] for each in factors]) for row, prompt in enumerate(prompts)
        ]

    def _written(self, prompt: str, factors: Sequence[float]) -> str:
        acting: dict[str, tuple[str, str]] = {}
        for (word, private), factor in zip(self._words, factors, strict=True):
            if not factor or not _pattern([word.token]).search(prompt):
                continue
            other, _ = acting.setdefault(word.token.lower(), (word.tuner, private))
            if other != word.tuner:
                raise RestuneError(
                    f"The tuners {other!r} and {word.tuner!r} both bring the word {word.token}; let one of them act."
                )
        if not acting:
            return prompt
        # Some letters, such as a dotless i, match one whose lower case they are not; their word is another.
        return _pattern(acting).sub(lambda match: acting.get(match[0].lower(), ("", match[0]))[1], prompt)


def contains_token(text: str, tokens: Sequence[str]) -> bool:
    """Say whether one of the new words is in a text."""
    return bool(_pattern(tokens).search(text))


def _pattern(tokens: Sequence[str] | dict[str, Any]) -> re.Pattern[str]:
    """Match whole words, the longest first, as CLIP reads them: in upper or lower case."""
    words = sorted(tokens, key=len, reverse=True)
    # `sks` is not meant in `asks`, while `<dog>` is meant in `a<dog>s`.
    ends = [(r"(?<!\w)" if w[0].isalnum() else "", r"(?!\w)" if w[-1].isalnum() else "") for w in words]
    return re.compile(
        "|".join(f"{left}{re.escape(word)}{right}" for word, (left, right) in zip(words, ends, strict=True)),
        re.IGNORECASE,
    )


class TokenizerCopy:
    """Makes copies of a tokenizer that know private characters, and keeps the last: making one takes half a second."""

    def __init__(self) -> None:
        self._kept: tuple[Any, int, int] | None = None
        self._copy: Any = None

    def of(self, tokenizer: Any, count: int) -> Any:
        """Return a copy of a tokenizer with `count` private characters as words."""
        made_from = (tokenizer, len(tokenizer), count)
        if self._kept is None or self._kept[0] is not tokenizer or self._kept[1:] != made_from[1:]:
            from transformers import AddedToken

            self._copy = copy.deepcopy(tokenizer)
            self._copy.add_tokens([AddedToken(chr(_FIRST + number), normalized=False) for number in range(count)])
            self._kept = made_from
        return self._copy
