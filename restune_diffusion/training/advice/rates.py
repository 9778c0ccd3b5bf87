"""Warnings about learning rates and caption dropout."""

from __future__ import annotations

from collections.abc import Iterator

from .outline import RunOutline

# More than ten times above or below the rates that train any of the families well (1e-4 to 5e-3 with AdamW).
_USUAL = {"lion": (1e-7, 5e-3), "prodigy": (0.1, 10.0)}
_USUAL_OF_ADAMW = (1e-6, 5e-2)
# The embeddings of placeholder tokens take higher rates.
_HIGHEST_OF_TEXT = 0.2


def rate_warnings(run: RunOutline) -> Iterator[str]:
    """Yield the warnings about the optimizer's rates."""
    optimizer = run.config.optimizer
    low, high = _USUAL.get(optimizer.name, _USUAL_OF_ADAMW)
    for flag, rate, highest in (
        ("--learning-rate", optimizer.learning_rate, high),
        ("--text-learning-rate", optimizer.text_learning_rate, max(high, _HIGHEST_OF_TEXT)),
    ):
        if rate is None or low <= rate <= highest:
            continue
        effect = "usually diverges" if rate > highest else "learns almost nothing"
        yield (
            f"{flag} {rate:g} with {optimizer.name} {effect}; usual rates are between {low * 100:g} and {high / 10:g}."
        )
    if run.config.caption_dropout > 0.5:
        yield (
            f"--caption-dropout {run.config.caption_dropout:g} hides most captions, so prompts have little effect on "
            f"the tuner; 0.1 is usual."
        )
