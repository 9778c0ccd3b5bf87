"""Purposes in plain words, and the settings that the page suggests for each: by base, device and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....storage.base_files.location import BUNDLED_BASE
from ....training.config.length.resolve import DEFAULT_STEPS
from ....training.config.length.rule import EpochsRule
from ....training.config.presets import PRESETS
from .form import CUSTOM, default_config, form_values


@dataclass(frozen=True)
class Purpose:
    """A purpose: its key, its label on the page, one sentence of help, and its preset."""

    key: str
    label: str
    info: str
    preset: str | None


PURPOSES = (
    Purpose("style", "A style", "How images are painted. 8 to 200 images of different things in one style.", "style"),
    Purpose("subject", "A person or a thing", "About 5 to 20 images of it, in different places.", "subject"),
    Purpose(
        "control",
        "Guidance by images",
        "Later, a sketch or a palette decides the composition. Hundreds of images are best.",
        None,
    ),
    Purpose("low-memory", "Least memory", "A style on a small graphics card. Takes longer.", "low-memory"),
    Purpose("lora", "A LoRA for other programs", "A style that ComfyUI, A1111 and diffusers read, too.", "lora"),
    Purpose("quality", "A style, slow and thorough", "Four times the computation, averaged weights.", "quality"),
    Purpose(CUSTOM, "My own settings", "Nothing is preset: the published recipe.", None),
)
_BY_KEY = {purpose.key: purpose for purpose in PURPOSES}

# Measured on the bundled base (docs/studio.md): long enough to see the style, short enough to wait for it.
_BUNDLED: dict[str, dict[str, Any]] = {
    "style": {"learning_rate": 1e-3, "res.width": 32, "batch_size": 8},
    "subject": {"learning_rate": 1e-3, "text_learning_rate": 5e-3, "batch_size": 4},
    "control": {"learning_rate": 1e-3, "batch_size": 8},
    "low-memory": {"learning_rate": 5e-3, "batch_size": 8, "gradient_accumulation_steps": 1},
    "lora": {"learning_rate": 1e-3},
    "quality": {"learning_rate": 5e-4, "gradient_accumulation_steps": 1},
}
_BUNDLED_STEPS = 240
_BUNDLED_GUIDANCE = 4.0
_CONTROL_STEPS = 10_000
_SAMPLED = 4
_SAVED = 4
# A wait of some minutes between two saved states is bearable.
_LONGEST_UNSAVED = 250


@dataclass(frozen=True)
class Device:
    """What the suggestions depend on: whether there is a GPU, and whether it computes in bf16."""

    gpu: bool = False
    bf16: bool = False


def purpose_of(preset: str | None, kinds: Sequence[str]) -> str:
    """Return the key of the purpose of a config, by its preset and its families."""
    if preset in _BY_KEY:
        return str(preset)
    return "control" if list(kinds) == ["control"] else CUSTOM


def preset_of(purpose: str) -> str | None:
    """Return the preset of a purpose, if it has one."""
    return _BY_KEY[purpose].preset


def is_bundled(base: str) -> bool:
    """Return whether a base is the small one of the package."""
    return base == str(BUNDLED_BASE)


def suggested_steps(purpose: str, base: str, images: int, images_per_step: int) -> int:
    """Return a number of steps: the preset's for the number of images, few on the bundled base.

    Args:
        purpose: key of the purpose.
        base: path or id of the base.
        images: number of training images; 0 if it is not known yet.
        images_per_step: images in one step.
    """
    preset = preset_of(purpose)
    length = PRESETS[preset].length if preset is not None else DEFAULT_STEPS
    if purpose == "control":
        length = _CONTROL_STEPS
    steps = length.steps(images or 20, images_per_step) if isinstance(length, EpochsRule) else length
    return min(steps, _BUNDLED_STEPS) if is_bundled(base) else steps


def suggestion(purpose: str, base: str, images: int, device: Device) -> dict[str, Any]:
    """Return the values of all fields for a purpose, except the names and prompts that the user writes.

    Args:
        purpose: key of the purpose.
        base: path or id of the base.
        images: number of training images; 0 if it is not known yet.
        device: the device that will train.
    """
    values = form_values(default_config(preset_of(purpose)))
    if purpose == "control":
        values |= {"tuner": ["control"], "control.conditions": ["canny"], "batch_size": 4, "learning_rate": 1e-4}
    if is_bundled(base):
        values |= {**_BUNDLED.get(purpose, {}), "validation.guidance": _BUNDLED_GUIDANCE, "validation.steps": 20}
    values["mixed_precision"] = "no" if not device.gpu else "bf16" if device.bf16 else "fp16"
    per_step = values["batch_size"] * values["gradient_accumulation_steps"]
    steps = suggested_steps(purpose, base, images, per_step)
    every = max(1, steps // _SAMPLED)
    values |= {"steps": steps, "validation.every": every, "checkpoint_every": min(_LONGEST_UNSAVED, every)}
    for name in ("name", "trigger_word", "text.tokens", "text.initializers", "validation.prompts", "class_prompt"):
        del values[name]
    return values


def sample_prompts(purpose: str, base: str, trigger: str, token: str, word: str) -> str:
    """Return prompts for the samples, one a line.

    Args:
        purpose: key of the purpose.
        base: path or id of the base.
        trigger: trigger word; may be empty.
        token: placeholder token of a subject; may be empty.
        word: ordinary word for the subject; may be empty.
    """
    if purpose == "subject":
        named = " ".join(filter(None, [token or "<it>", word]))
        return "\n".join(
            [named, f"{named}, on a blue background"] if is_bundled(base) else [named, f"{named} on a beach"]
        )
    subjects = ("red apple", "cat face") if is_bundled(base) else ("a cat on a chair", "a house by a lake")
    return "\n".join(f"{subject}, {trigger}" if trigger else subject for subject in subjects)
