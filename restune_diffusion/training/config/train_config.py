"""Settings of a training run: the CLI's flags, the Python argument and what the tuner's file records."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from ...data.config import DataConfig
from ...hooks.placeholder_tokens import contains_token
from ...tuners.configs import BypassConfig, ControlConfig, PartConfig, ResConfig, SkipConfig, TextConfig
from ...tuners.registry import ConditionedConfig, tuner_families, tuner_family
from ...utils.setting_groups import (
    Affects,
    SettingGroup,
    SettingInfo,
    all_settings,
    close_groups,
    open_groups,
    setting,
)
from ...utils.settings_merge import RefusedSetting, checked_fields, layered
from .checkpoints import CheckpointsConfig
from .family_fields import FamilyFields
from .feature_cache import FeatureCacheConfig
from .loss import LossConfig
from .memory import MemoryConfig
from .noise import NoiseConfig
from .optimizer import OptimizerConfig
from .preservation import PreservationConfig
from .presets import PRESETS, PresetName
from .renamed import RENAMED, renamed, sentence, warn
from .tuner_settings import FamilyName, checked_families, with_families
from .validation import ValidationConfig


class TrainConfig(FamilyFields):
    """Everything that decides a training run. The defaults are the published SCEdit recipe."""

    data: DataConfig
    base: str = setting(affects="content")
    """Stable Diffusion checkpoint in diffusers' layout: a directory, or the id of a hub repository."""
    output: Path = setting(affects="output", recorded=False)
    """Folder for the tuner, the checkpoints, the samples and `metrics.jsonl`."""
    name: str = setting("tuner", affects="output", pattern=r"^[\w][\w.\- ]*$")
    """Name of the tuner; its file is OUTPUT/NAME.safetensors."""
    preset: PresetName | None = setting(None, affects="output")
    """Settings for a purpose, which all others given win over; the manual, docs/training.md, lists them."""

    tuner: FamilyName | tuple[FamilyName, ...] = "skip"
    """Family of the tuner; several make one tuner of several parts. `command_line_class` lists the families."""
    skip: SkipConfig = SkipConfig()
    control: ControlConfig = ControlConfig()
    res: ResConfig = ResConfig()
    bypass: BypassConfig = BypassConfig()
    text: TextConfig = TextConfig()
    control_data: Path | None = setting(None, affects="batches", recorded=False)
    """Folder of condition images for a control tuner, named as the training images; for several conditions a folder
    of such folders, named as the conditions. Without it the files that `metadata.jsonl` names under `condition` are
    used, or the condition is made from the image if it is called canny, palette, blur or mask."""

    preservation: PreservationConfig = PreservationConfig()

    steps: int = setting(2000, affects="tuner", gt=0)
    """Optimizer steps."""
    batch_size: int = setting(1, affects="order", swept=True, gt=0)
    """Images of one forward pass, per process."""
    gradient_accumulation_steps: int = setting(1, affects="order", gt=0)
    """Forward passes of one optimizer step."""
    optimizer: OptimizerConfig = OptimizerConfig()
    memory: MemoryConfig = MemoryConfig()
    caption_dropout: float = setting(0.0, affects="batches", swept=True, ge=0, le=1)
    """Share of the samples that train with an empty caption."""
    loss: LossConfig = LossConfig()
    noise: NoiseConfig = NoiseConfig()
    feature_cache: FeatureCacheConfig = FeatureCacheConfig()
    sweep: str | None = setting(None, affects="output", recorded=False)
    """Train a tuner for each combination of settings, on one set of encoded images: "ratio=0.1,0.25 lr=1e-4,5e-4".
    Each is a run of its own in OUTPUT/NAME-ratio0.1-lr1e-4; bypass tuners share every pass of the base."""
    seed: int = setting(0, affects="batches", swept=True)
    """Seed of everything that is drawn at random."""

    validation: ValidationConfig = setting(ValidationConfig(), affects="output")
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    log_with: Literal["auto", "tensorboard", "wandb", "none"] = setting("auto", affects="output")
    """Where to log beside `metrics.jsonl`: to TensorBoard in OUTPUT/logs, where it is installed (`auto`), or to
    Weights & Biases, which sends the log over the network."""

    if TYPE_CHECKING:

        def __init__(self, **settings: Any) -> None:
            """Take settings by their flat names or in groups."""

    else:

        def __getattr__(self, name: str) -> Any:
            """Read a setting by the flat name that it had before there were groups; goes with the next release."""
            info = SETTINGS.get(RENAMED.get(name, name))
            if info is None or len(info.place) == 1:
                return super().__getattr__(name)
            warn(sentence(f"config.{name}", f"config.{'.'.join(info.place)}"))
            return info.of(self)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> TrainConfig:
        """Copy with other settings, by flat name or whole groups; as in pydantic, their values are not checked."""
        whole = {name: value for name, value in (update or {}).items() if isinstance(value, SettingGroup)}
        rest = {name: value for name, value in (update or {}).items() if name not in whole}
        known = with_families(type(self))
        for name, values in close_groups(known, open_groups(known, renamed(rest).values)[0]).items():
            group = whole.get(name, getattr(self, name))
            whole[name] = group.model_copy(update=values) if isinstance(group, SettingGroup) else values
        return super().model_copy(update=whole, deep=deep)

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        return checked_families(cls, values) if isinstance(values, dict) else values

    @model_validator(mode="before")
    @classmethod
    def _in_groups(cls, values: Any) -> Any:
        """Put flat settings into their groups, over those of the preset."""
        if not isinstance(values, dict):
            return values
        try:
            # As in a dictionary, so that a dump with some settings changed, or over others, is a config again.
            flat, _ = open_groups(with_families(cls), renamed(values).values, later_wins=True)
        except RefusedSetting as refused:
            raise ValueError(refused.reason) from refused
        name = flat.get("preset")
        # An unknown one is refused with the other fields.
        below = PRESETS[name].settings if isinstance(name, str) and name in PRESETS else {}
        return close_groups(with_families(cls), layered(below, flat))

    @model_validator(mode="after")
    def _settings_fit_together(self) -> TrainConfig:
        if not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ValueError("a tuner needs one or more kinds of parts, each once")
        for kind in self.untrained:
            if getattr(self, kind) != tuner_family(kind).config() and not self._is_from_preset(kind):
                trained = " and ".join(self.kinds)
                raise ValueError(f"settings of the {kind} tuner are given, but the tuner to train is {trained}")
        self._check_control()
        self._check_preservation()
        self._check_text()
        cached = self.feature_cache.draws is not None
        if cached and not self.learns_from_features:
            raise ValueError(
                "a feature cache is for a tuner of a bypass part alone, whose gradient never enters the base; "
                "leave feature_cache out, or train a bypass"
            )
        if cached and (self.data.bucketing or self.preservation.method != "none"):
            raise ValueError("a feature cache is for images of one size without preservation; leave one of them out")
        if self.memory.drop_encoders and self.validation.prompts:
            raise ValueError("validation prompts need the encoders; leave drop_encoders or the prompts out")
        return self

    def _check_text(self) -> None:
        given = self.optimizer.text_learning_rate is not None and not self._is_from_preset("text_learning_rate")
        if given and not self.learns_from_text:
            raise ValueError("a text learning rate is given, but the tuner to train has no text part")
        if self.memory.drop_encoders and self.learns_from_text:
            raise ValueError("a text part is trained in the text encoders; leave drop_encoders out")

    def _check_control(self) -> None:
        needed = len(self.validation.prompts) * len(self.conditioned.conditions) if self.conditioned else 0
        given = len(self.validation.control_images)
        if given != needed:
            raise ValueError(
                f"the validation prompts need {needed} control images, one for each condition of each prompt, "
                f"but {given} are given"
            )
        if self.control_data is not None and self.conditioned is None:
            raise ValueError("condition images are given, but the tuner to train is not a control tuner")

    def _check_preservation(self) -> None:
        class_prompt = self.preservation.class_prompt
        if self.preservation.method == "prior" and self.conditioned is not None:
            raise ValueError("class images have no condition images for a control tuner; choose output preservation")
        if self.validation.drift_prompts and self.conditioned is not None:
            raise ValueError("a control tuner draws nothing without its images, so that no drift can be measured")
        if class_prompt and self.new_words and contains_token(class_prompt, self.new_words):
            raise ValueError(f"the class prompt {class_prompt!r} has the subject's own word; leave it out there")

    @property
    def drift_prompts(self) -> tuple[str, ...]:
        """Prompts for which the drift from the base is measured."""
        asked, class_prompt = self.validation.drift_prompts, self.preservation.class_prompt
        if self.conditioned is not None:
            return ()
        return asked if asked is not None else (class_prompt,) if class_prompt else ()

    @property
    def feature_cache_folder(self) -> Path:
        """Folder of the feature caches; by default OUTPUT/feature-cache, or the one that it was called before."""
        before = self.output / "feature-bank"
        return self.feature_cache.folder or (before if before.is_dir() else self.output / "feature-cache")

    def _is_from_preset(self, name: str) -> bool:
        """Tell whether a preset says the same; it may set what another kind of tuner does not need."""
        settings = PRESETS[self.preset].settings if self.preset is not None else {}
        return name in settings and checked_settings({name: settings[name]})[name] == current_settings()[name].of(self)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Families of the parts that the tuner is made of."""
        return (self.tuner,) if isinstance(self.tuner, str) else self.tuner

    @property
    def untrained(self) -> tuple[str, ...]:
        """Families that the tuner has no part of; their settings mean nothing."""
        names = (family.name for family in tuner_families())
        return tuple(name for name in names if name not in self.kinds and hasattr(self, name))

    @property
    def parts(self) -> tuple[PartConfig, ...]:
        """Configs of the parts that the tuner is made of."""
        return tuple(getattr(self, kind) for kind in self.kinds)

    @property
    def conditioned(self) -> ConditionedConfig | None:
        """Config of the part that takes condition images, if there is one."""
        return next((part for part in self.parts if isinstance(part, ConditionedConfig)), None)

    @property
    def new_words(self) -> tuple[str, ...]:
        """Words that the parts add to prompts."""
        return tuple(word for part in self.parts for word in part.new_words)

    @property
    def learns_from_text(self) -> bool:
        """Whether a part acts on the text encoders, so that captions are encoded anew in each step."""
        return any(part.acts_on_text_encoders for part in self.parts)

    @property
    def learns_from_features(self) -> bool:
        """Whether the tuner is one part that writes at `out` alone, and so can learn from recorded features."""
        return len(self.parts) == 1 and self.parts[0].writes_at_out_alone

    @property
    def file(self) -> Path:
        """Where the finished tuner is written."""
        return self.output / f"{self.name}.safetensors"

    def recorded(self) -> dict[str, Any]:
        """Return the settings that the tuner's file records, as plain JSON values.

        Their names are flat and never change, so that files and checkpoints of before are read. Left out are the
        settings of the kinds of tuner that are not trained, and paths, which say more about a person's machine than
        about the tuner.
        """
        settings = self.model_dump(mode="json")
        recorded: dict[str, Any] = {
            info.record: reduce(getitem, info.place, settings)
            for info in _record_order()
            if info.record is not None and info.name not in self.untrained and info.place[0] in settings
        }
        validation = settings["validation"]
        recorded["validation"] = {info.record: validation[name] for name, info in _VALIDATION.items() if info.record}
        if Path(self.base).exists():
            recorded["base"] = Path(self.base).resolve().name
        return recorded


@cache
def _settings_of(model: type[TrainConfig]) -> Mapping[str, SettingInfo]:
    # The features of the batches that a part which writes at `out` alone learns from do not depend on it.
    families: dict[str, Affects] = {
        name: "tuner" if field.annotation.writes_at_out_alone else "batches"
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, PartConfig)
    }
    return all_settings(model, {"tuner": "batches", **families})


SETTINGS = _settings_of(TrainConfig)
"""Settings by flat name; a field that does not say what it affects is an error here."""


def current_settings() -> Mapping[str, SettingInfo]:
    """Return `SETTINGS` and those of the registered tuner families of other packages."""
    return _settings_of(with_families(TrainConfig))


_VALIDATION = all_settings(ValidationConfig)
# Files of before record these in front of others than their group does now.
_RECORDED_BEFORE = {"gradient_checkpointing": "feature_cache", "drop_encoders": "seed"}


def _record_order() -> list[SettingInfo]:
    settings = current_settings()
    order = list(settings)
    for name, follower in _RECORDED_BEFORE.items():
        order.remove(name)
        order.insert(order.index(follower), name)
    return [settings[name] for name in order]


def checked_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check settings by flat name, each on its own, and return them in the types of `TrainConfig`.

    Raises:
        RefusedSetting: for the first that is not allowed.
    """
    return checked_fields({name: current_settings()[name].field for name in values}, values)


def current_names(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings, of this or another release, under the flat names that settings have now."""
    names = {info.record: info.name for info in current_settings().values() if info.record is not None}
    of_validation = {info.record: info.name for info in _VALIDATION.values() if info.record is not None}
    result = {names.get(name, name): value for name, value in recorded.items()}
    validation = result.get("validation")
    if isinstance(validation, Mapping):
        result["validation"] = {of_validation.get(name, name): value for name, value in validation.items()}
    return result
