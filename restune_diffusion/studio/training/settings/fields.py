"""Fields of the form: which settings it shows, in plain words, and for which tuners each matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, TypeAlias, get_args

from ....imaging.conditions import MAKERS
from ....training.config.train_config import SETTINGS, TrainConfig, current_settings
from ....tuners.registry import ConditionedConfig, tuner_families, tuner_family

Kinds: TypeAlias = Sequence[str]
"""Families of the tuner to train."""
Section: TypeAlias = Literal["run", "tuner", "learning", "images", "samples", "memory"]
Kind: TypeAlias = Literal["text", "lines", "integer", "number", "optional", "choice", "several", "switch"]


@dataclass(frozen=True)
class Field:
    """One field of the form.

    Attributes:
        name: flat name of the setting; `group.name` for those of a family and of the validation.
        label: label on the page.
        info: one sentence of help.
        kind: type of the input.
        section: part of the form.
        choices: values to choose from, each with its label.
        matters: function from the families of the tuner to whether the setting has an effect.
    """

    name: str
    label: str
    info: str
    kind: Kind
    section: Section
    choices: tuple[tuple[str, str | None], ...] = ()
    matters: Callable[[Kinds], bool] = lambda kinds: True

    @property
    def place(self) -> tuple[str, ...]:
        """Names of the group, if any, and of the setting."""
        return tuple(self.name.split("."))

    @property
    def elem_id(self) -> str:
        """Id of the component on the page."""
        return f"train-{self.name.replace('.', '-').replace('_', '-')}"

    def holds(self, config: TrainConfig) -> bool:
        """Return whether the input can show the value in a config; the page keeps other values unchanged."""
        value = self._value(config)
        if self.kind in ("integer", "number", "optional"):
            return value is None or isinstance(value, int | float)
        return self.name != "text.initializers" or len(value) <= 1

    def of(self, config: TrainConfig) -> Any:
        """Return the value in a config, in the form that the input has."""
        value = self._value(config)
        if not self.holds(config):
            return None
        if self.kind == "several":
            return [value] if isinstance(value, str) else list(value)
        if self.kind == "lines":
            return "\n".join(value)
        if self.kind == "optional":
            return "" if value is None else f"{value:g}"
        if self.kind == "text":
            return " ".join(value) if isinstance(value, tuple) else value or ""
        return value

    def _value(self, config: TrainConfig) -> Any:
        if len(self.place) > 1:
            return reduce(getattr, self.place, config)
        return current_settings()[self.name].of(config)

    def parsed(self, value: Any) -> Any:
        """Return the setting's value for that of the input; None if the input is empty."""
        if self.kind == "switch":
            return bool(value)
        if value is None or (isinstance(value, str) and not value.strip()):
            return [] if self.kind == "lines" else None
        if self.kind == "lines":
            return [line.strip() for line in str(value).splitlines() if line.strip()]
        if self.kind == "several":
            return list(value)
        if self.kind == "optional":
            return _number(str(value).strip())
        if self.kind == "integer" and float(value) == int(value):
            return int(value)
        return value.strip() if isinstance(value, str) else value


def _number(text: str) -> int | float | str:
    """Return a number, or the text itself, which the settings then refuse with a reason."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def has(*families: str) -> Callable[[Kinds], bool]:
    """Return a condition: one of these families is trained."""
    return lambda kinds: any(family in kinds for family in families)


def acts_on_text(kinds: Kinds) -> bool:
    """Return whether a part acts on the text encoders."""
    return any(tuner_family(kind).config.acts_on_text_encoders for kind in kinds)


def takes_conditions(kinds: Kinds) -> bool:
    """Return whether a part takes condition images."""
    return any(issubclass(tuner_family(kind).config, ConditionedConfig) for kind in kinds)


def learns_from_features(kinds: Kinds) -> bool:
    """Return whether training can use a feature cache."""
    return len(kinds) == 1 and tuner_family(kinds[0]).config.writes_at_out_alone


def family_choices() -> tuple[tuple[str, str | None], ...]:
    """Return the registered families with labels."""
    return tuple(
        (f"{family.name}: {family.summary.split(' (')[0].split(';')[0]}", family.name) for family in tuner_families()
    )


def all_fields() -> tuple[Field, ...]:
    """Return the fields of the form in their order."""
    return (*_RUN, *_tuner(), *_LEARNING, *_IMAGES, *_SAMPLES, *_MEMORY)


_RUN = (
    Field("name", "Name of the tuner", "The file gets this name.", "text", "run"),
    Field(
        "trigger_word",
        "Trigger word",
        "Words that call the style in a prompt, for example: ink style. They are put before captions without them.",
        "text",
        "run",
        matters=lambda kinds: not acts_on_text(kinds),
    ),
    Field(
        "text.tokens",
        "New word for it",
        "A word that does not exist, for example <miu>. Prompts with it show the person or thing.",
        "text",
        "run",
        matters=acts_on_text,
    ),
    Field(
        "text.initializers",
        "What it is",
        "One ordinary word to start from, for example: cat. Empty starts from nothing.",
        "text",
        "run",
        matters=acts_on_text,
    ),
    Field(
        "control.conditions",
        "Guided by",
        "What is computed from each training image; the tuner learns to follow it.",
        "several",
        "run",
        tuple((name, name) for name in MAKERS),
        has("control"),
    ),
    Field(
        "steps",
        "Steps",
        "How often the tuner is improved. More steps take longer, and too many memorize the images.",
        "integer",
        "run",
    ),
    Field(
        "validation.prompts",
        "Sample prompts",
        "One prompt a line. Samples during training show how far the tuner has come.",
        "lines",
        "run",
    ),
)


def _tuner() -> tuple[Field, ...]:
    return (
        Field(
            "tuner",
            "Tuner family",
            "Where the tuner changes the base. Several families make one tuner with several parts.",
            "several",
            "tuner",
            family_choices(),
        ),
        Field(
            "res.width", "Width", "Size of a res tuner; for LoRA this is the rank.", "integer", "tuner", (), has("res")
        ),
        Field(
            "res.grad_depth",
            "Last blocks only",
            "Tune only the last N blocks of the base: less memory. Empty tunes all.",
            "optional",
            "tuner",
            (),
            has("res"),
        ),
        Field("skip.ratio", "Size of the skip part", "1 is the published size.", "number", "tuner", (), has("skip")),
        Field("bypass.ratio", "Size of the bypass", "0.5 is the default.", "number", "tuner", (), has("bypass")),
        Field("control.ratio", "Size of the control part", "1 is published.", "number", "tuner", (), has("control")),
        Field(
            "text.rank",
            "Rank on the text encoder",
            "0 trains the new word alone.",
            "integer",
            "tuner",
            (),
            has("text"),
        ),
    )


_LEARNING = (
    Field("learning_rate", "Learning rate", "Size of each step. Too high spoils the images.", "number", "learning"),
    Field(
        "text_learning_rate",
        "Learning rate of the new word",
        "Empty uses the rate above.",
        "optional",
        "learning",
        matters=acts_on_text,
    ),
    Field("batch_size", "Images at once", "More are steadier and need more memory.", "integer", "learning"),
    Field(
        "gradient_accumulation_steps",
        "Batches per step",
        "Acts like more images at once without their memory, and takes longer.",
        "integer",
        "learning",
    ),
    Field(
        "lr_scheduler",
        "Course of the learning rate",
        "cosine lowers it to zero at the end.",
        "choice",
        "learning",
        tuple((name.replace("_", " "), name) for name in get_args(SETTINGS["lr_scheduler"].field.annotation)),
    ),
    Field("ema_decay", "Average of the weights", "0.999 is usual; empty keeps none.", "optional", "learning"),
    Field("seed", "Seed", "The same seed and settings give the same tuner.", "integer", "learning"),
)

_IMAGES = (
    Field("resolution", "Size of the images", "Side in pixels; empty is that of the base.", "optional", "images"),
    Field("bucketing", "Keep the shape of the images", "Otherwise the middle square is used.", "switch", "images"),
    Field("flip", "Mirror images at random", "Not for text or faces with a parting.", "switch", "images"),
    Field(
        "caption_dropout",
        "Share of empty captions",
        "0.1 hides one caption in ten, so that the style also comes without words.",
        "number",
        "images",
    ),
    Field(
        "class_prompt",
        "Class to keep",
        "For example: a cat. Other cats then stay as they were.",
        "text",
        "images",
        matters=acts_on_text,
    ),
)

_SAMPLES = (
    Field(
        "validation.every", "Sample every N steps", "0 samples at the start and the end only.", "integer", "samples"
    ),
    Field(
        "validation.guidance", "Guidance of the samples", "How closely they follow the prompt.", "number", "samples"
    ),
    Field("validation.steps", "Denoising steps of the samples", "More are finer and slower.", "integer", "samples"),
    Field(
        "validation.holdout",
        "Images to hold out",
        "Their loss shows when the tuner begins to memorize; empty holds out none.",
        "optional",
        "samples",
    ),
    Field(
        "checkpoint_every",
        "Save every N steps",
        "From the last saved step a run goes on after a power failure.",
        "integer",
        "samples",
    ),
)

_MEMORY = (
    Field(
        "mixed_precision",
        "Precision",
        "bf16 and fp16 halve the memory of the base; fp16 needs a GPU.",
        "choice",
        "memory",
        (("fp32", "no"), ("bf16", "bf16"), ("fp16", "fp16")),
    ),
    Field(
        "gradient_checkpointing",
        "Compute twice to save memory",
        "Slower by about a third.",
        "switch",
        "memory",
        matters=lambda kinds: not learns_from_features(kinds),
    ),
    Field(
        "feature_cache",
        "Cached samples per image",
        "Writes what the base computes to disk once, then trains fast. Empty caches nothing.",
        "optional",
        "memory",
        matters=learns_from_features,
    ),
)
