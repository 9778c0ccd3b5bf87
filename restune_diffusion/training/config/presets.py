"""Presets: named sets of training settings, which a YAML file and the command line override."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ...utils.settings_merge import flat
from .length.rule import EpochsRule

PresetName: TypeAlias = Literal["style", "subject", "low-memory", "quality", "lora"]


@dataclass(frozen=True)
class Preset:
    """Settings for one purpose; settings that depend on the base, such as the resolution, come from the base.

    `length` is the number of steps, or a rule that derives it from the number of training images. It applies if
    neither `steps` nor `epochs` is set.
    """

    purpose: str
    settings: Mapping[str, Any]
    length: int | EpochsRule

    def describe(self) -> str:
        """Return the purpose of the preset, its settings as flags, and its length."""
        flags = [f"--{name.replace('_', '-')} {_arguments(value)}" for name, value in flat(self.settings)]
        if isinstance(self.length, EpochsRule):
            return f"{self.purpose}: {' '.join(flags)}; {self.length}"
        return f"{self.purpose}: {' '.join([*flags, f'--steps {self.length}'])}"


PRESETS: Mapping[str, Preset] = {
    "style": Preset(
        "a style from about 8 to 200 images",
        {
            # Measured in docs/bypass.md: style and kept concepts as with LoRA, with a third of its stored activations.
            "tuner": "res",
            "res": {"grad_depth": 3, "width": 64},
            "batch_size": 4,
            "learning_rate": 5e-4,
            "lr_scheduler": "cosine",
            "caption_dropout": 0.1,
        },
        # Measured in benchmarks/results/preset_length.md: the held-out loss is lowest near 100 epochs.
        length=EpochsRule(epochs=100, at_least=250, at_most=2000),
    ),
    "subject": Preset(
        "one object, person or animal from about 5 images, bound to a placeholder token",
        {
            "tuner": ("skip", "text"),
            "batch_size": 1,
            "learning_rate": 1e-4,
            "text_learning_rate": 1e-3,
            "lr_scheduler": "cosine",
        },
        length=800,
    ),
    "low-memory": Preset(
        "the lowest peak memory, without backpropagation through the U-Net",
        {
            "tuner": "bypass",
            "batch_size": 1,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-3,
            "lr_scheduler": "cosine",
            "mixed_precision": "bf16",
        },
        length=4000,
    ),
    "quality": Preset(
        "a style with the published recipe and four times the compute, with larger batches and averaged weights",
        {
            "tuner": "skip",
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-4,
            "lr_scheduler": "cosine",
            "caption_dropout": 0.1,
            "ema_decay": 0.999,
        },
        length=4000,
    ),
    "lora": Preset(
        "a style or subject as a plain LoRA, which `restune convert` writes for diffusers, ComfyUI and A1111",
        {
            "tuner": "lora",
            "res": {"width": 16},
            "batch_size": 4,
            "learning_rate": 1e-4,
            "lr_scheduler": "cosine",
            "caption_dropout": 0.1,
        },
        length=2000,
    ),
}


def _arguments(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
