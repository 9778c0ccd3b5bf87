"""Named sets of training settings; a file's and the command line's own settings win over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ...utils.settings_merge import flat

PresetName: TypeAlias = Literal["style", "subject", "low-memory", "quality"]


@dataclass(frozen=True)
class Preset:
    """Settings for one purpose; those of the base, such as the resolution, come from the base."""

    purpose: str
    settings: Mapping[str, Any]

    def describe(self) -> str:
        """Say what the preset is for and sets, as flags."""
        flags = [f"--{name.replace('_', '-')} {_words(value)}" for name, value in flat(self.settings)]
        return f"{self.purpose}: {' '.join(flags)}"


PRESETS: Mapping[str, Preset] = {
    "style": Preset(
        "a style from some 20 to 200 pictures",
        {
            # Of the dial of docs/bypass.md: as much style as LoRA, as many concepts kept, a third of what it keeps.
            "tuner": "res",
            "res": {"grad_depth": 3, "width": 64},
            "steps": 2000,
            "batch_size": 4,
            "learning_rate": 5e-4,
            "lr_scheduler": "cosine",
            "caption_dropout": 0.1,
        },
    ),
    "subject": Preset(
        "one thing or being from some 5 pictures, under a new word",
        {
            "tuner": ("skip", "text"),
            "steps": 800,
            "batch_size": 1,
            "learning_rate": 1e-4,
            "text_learning_rate": 1e-3,
            "lr_scheduler": "cosine",
        },
    ),
    "low-memory": Preset(
        "the smallest peak: nothing is propagated back through the U-Net",
        {
            "tuner": "bypass",
            "steps": 4000,
            "batch_size": 1,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-3,
            "lr_scheduler": "cosine",
            "mixed_precision": "bf16",
        },
    ),
    "quality": Preset(
        "a style by the published recipe and four times the work: larger batches, averaged weights",
        {
            "tuner": "skip",
            "steps": 4000,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-4,
            "lr_scheduler": "cosine",
            "caption_dropout": 0.1,
            "ema_decay": 0.999,
        },
    ),
}


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
