"""Settings of a training run, used by the command line, YAML files, Python and the records in tuner files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError, model_validator

from ...data.config import DataConfig
from ...hooks.placeholder_tokens import contains_token
from ...storage.base_files.location import public_name
from ...tuners.configs import BypassConfig, ControlConfig, PartConfig, ResConfig, SkipConfig, TextConfig
from ...tuners.registry import ConditionedConfig, tuner_families, tuner_family
from ...utils.setting_groups import (
    Affects,
    SettingGroup,
    SettingInfo,
    all_settings,
    close_groups,
    first_refused_setting,
    open_groups,
    setting,
)
from ...utils.settings_merge import RefusedSetting, checked_fields
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
from .teacher.data import with_generated_data
from .teacher.settings import TeacherConfig
from .tuner_settings import FamilyName, checked_families, with_families, without_aliases
from .validation import ValidationConfig

_NAME = "letters, digits, `.`, `_`, `-` and spaces, with a letter or digit first"


class TrainConfig(FamilyFields):
    """All settings of a training run. The defaults are the published SCEdit recipe."""

    data: DataConfig
    base: str = setting(affects="content")
    """Stable Diffusion 1.x, 2.x or XL: a folder in diffusers' format, a safetensors file, or the ID of a repository on
    the Hugging Face Hub."""
    vae: str | None = setting(None, affects="content")
    """Autoencoder (VAE) instead of the base's own: a folder of an AutoencoderKL, a safetensors file, or the ID of a
    repository on the Hub."""
    output: Path = setting(affects="output", recorded=False)
    """Output folder for the tuner, the checkpoints, the samples and `metrics.jsonl`. Called OUTPUT below."""
    name: str = setting("tuner", affects="output", pattern=r"^[\w][\w.\- ]*$", expected=_NAME)
    """Name of the tuner, which is written to OUTPUT/NAME.safetensors."""
    preset: PresetName | None = setting(None, affects="output")
    """Named set of settings for one purpose, listed above and in docs/training/presets.md. Settings in --config and
    flags override it."""

    tuner: FamilyName | tuple[FamilyName, ...] = "skip"
    """Tuner family; several families make one tuner with several parts. `command_line_class` lists the families."""
    skip: SkipConfig = SkipConfig()
    control: ControlConfig = ControlConfig()
    res: ResConfig = ResConfig()
    bypass: BypassConfig = BypassConfig()
    text: TextConfig = TextConfig()
    init_tuner: Path | None = setting(None, affects="tuner", recorded=False)
    """Tuner file whose weights the run starts from. Families and settings of its parts must be those of the tuner to
    train."""
    control_data: Path | None = setting(None, affects="batches", recorded=False)
    """Folder of condition images for a `control` tuner, with the same file names as the training images. For several
    conditions, a folder with one subfolder per condition, named after it. If not set, the files listed under
    `condition` in `metadata.jsonl` are used; conditions named canny, palette, blur or mask can also be computed from
    the training images."""

    teacher: TeacherConfig = TeacherConfig()
    preservation: PreservationConfig = PreservationConfig()

    steps: int | None = setting(None, affects="tuner", gt=0)
    """Number of optimizer steps. If neither this nor --epochs is set: that of the preset, or 2000."""
    epochs: float | None = setting(None, affects="tuner", recorded=False, swept=True, gt=0)
    """Number of epochs, instead of --steps: how many times the training data is shown."""
    batch_size: int = setting(1, affects="order", swept=True, gt=0)
    """Images per forward pass and process."""
    gradient_accumulation_steps: int = setting(1, affects="order", gt=0)
    """Forward passes per optimizer step."""
    optimizer: OptimizerConfig = OptimizerConfig()
    memory: MemoryConfig = MemoryConfig()
    caption_dropout: float = setting(0.0, affects="batches", swept=True, ge=0, le=1)
    """Probability of training on a sample with an empty caption."""
    loss: LossConfig = LossConfig()
    noise: NoiseConfig = NoiseConfig()
    feature_cache: FeatureCacheConfig = FeatureCacheConfig()
    sweep: str | None = setting(None, affects="output", recorded=False)
    """Train one tuner for each combination of values, on the same encoded images: "ratio=0.1,0.25 lr=1e-4,5e-4".
    Each run has its own folder, for instance OUTPUT/NAME-ratio0.1-lr1e-4. `bypass` tuners also share the forward
    passes of the base."""
    seed: int = setting(0, affects="batches", swept=True)
    """Seed of all random numbers: initial weights, order of the data, noise, timesteps and dropout."""

    validation: ValidationConfig = setting(ValidationConfig(), affects="output")
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    log_with: Literal["auto", "tensorboard", "wandb", "none"] = setting("auto", affects="output")
    """Logger in addition to `metrics.jsonl`. `auto`: TensorBoard in OUTPUT/logs if it is installed. `wandb`: Weights &
    Biases, which sends the log over the network."""

    if TYPE_CHECKING:

        def __init__(self, **settings: Any) -> None:
            """Accept settings by flat name or in groups."""

    else:

        def __getattr__(self, name: str) -> Any:
            """Return a setting by its deprecated flat attribute name; will be removed in the next release."""
            info = SETTINGS.get(RENAMED.get(name, name))
            if info is None or len(info.place) == 1:
                return super().__getattr__(name)
            warn(sentence(f"config.{name}", f"config.{'.'.join(info.place)}"))
            return info.of(self)

    @classmethod
    def refused(cls, error: ValidationError) -> RefusedSetting:
        """Return the first invalid setting of a validation error, under its flat name."""
        return first_refused_setting(with_families(cls), error)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> TrainConfig:
        """Return a copy with changed settings, by flat name or whole groups; not validated, as in pydantic."""
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
        """Merge flat settings over those of the preset, and put them into their groups."""
        if not isinstance(values, dict):
            return values
        try:
            # The later value wins, as in a dictionary, so that a dump can be changed by adding flat settings to it.
            flat, _ = open_groups(with_families(cls), renamed(values).values, later_wins=True)
        except RefusedSetting as refused:
            raise ValueError(refused.reason) from refused
        name = flat.get("preset")
        # The validation of the fields reports an unknown preset.
        below = PRESETS[name].settings if isinstance(name, str) and name in PRESETS else {}
        return close_groups(with_families(cls), with_generated_data(without_aliases(flat, below)))

    @model_validator(mode="after")
    def _settings_fit_together(self) -> TrainConfig:
        if not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ValueError(
                f"tuner = {' '.join(self.kinds) or '()'} is not valid; name one or more tuner families, each once"
            )
        for kind in self.untrained:
            if getattr(self, kind) != tuner_family(kind).config() and not self._is_from_preset(kind):
                trained = " and ".join(self.kinds)
                raise ValueError(f"settings of the {kind} tuner are given, but the tuner to train is {trained}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both set, but either gives the length of the run; keep one")
        self._check_control()
        self.teacher.check_run(self.data, self.validation.holdout, conditioned=self.conditioned is not None)
        self._check_preservation()
        self._check_text()
        self.validation.check_holdout()
        self.validation.check_metrics()
        self.checkpoints.check_measured(self.validation.measured)
        cached = self.feature_cache.draws is not None
        if cached and not self.learns_from_features:
            raise ValueError(
                "a feature cache is for a tuner of a bypass part alone, whose gradient never enters the base; "
                "leave feature_cache out, or train a bypass tuner"
            )
        if cached and (self.data.bucketing or self.preservation.method != "none"):
            raise ValueError(
                "a feature cache supports neither bucketing nor preservation; leave feature_cache or these out"
            )
        only_text = all(part.acts_on_text_encoders for part in self.parts)
        self.loss.check_consistency(only_text, self.memory.gradient_checkpointing)
        if self.memory.drop_encoders and (self.validation.prompts or self.validation.metrics):
            asked = "prompts" if self.validation.prompts else "metrics"
            raise ValueError(
                f"validation {asked} need the encoders; leave drop_encoders or the validation {asked} out"
            )
        return self

    def _check_text(self) -> None:
        given = self.optimizer.text_learning_rate is not None and not self._is_from_preset("text_learning_rate")
        if given and not self.learns_from_text:
            raise ValueError(
                "a text learning rate is given, but the tuner to train has no text part; "
                "leave text_learning_rate out, or add text to tuner"
            )
        if self.memory.drop_encoders and self.learns_from_text:
            raise ValueError("training a text part needs the text encoders; leave drop_encoders out")

    def _check_control(self) -> None:
        needed = len(self.validation.prompts) * len(self.conditioned.conditions) if self.conditioned else 0
        given = len(self.validation.control_images)
        if given != needed:
            raise ValueError(
                f"the validation prompts need {needed} control images, one for each condition of each prompt, "
                f"but {given} are given"
            )
        if self.validation.metrics and self.conditioned is not None:
            raise ValueError(
                "metrics do not support a control tuner, which generates no image without condition images; "
                "leave validation.metrics out"
            )
        if self.control_data is not None and self.conditioned is None:
            raise ValueError(
                "control_data is given, but the tuner to train is not a control tuner; "
                "leave control_data out, or add control to tuner"
            )

    def _check_preservation(self) -> None:
        class_prompt = self.preservation.class_prompt
        if self.preservation.method == "prior" and self.conditioned is not None:
            raise ValueError(
                "prior preservation does not support a control tuner, because class images have no condition images; "
                "choose output preservation"
            )
        if self.validation.drift_prompts and self.conditioned is not None:
            raise ValueError(
                "drift prompts do not support a control tuner, which generates no image without condition images; "
                "leave validation.drift_prompts out"
            )
        if class_prompt and self.new_words and contains_token(class_prompt, self.new_words):
            raise ValueError(
                f"the class prompt {class_prompt!r} contains a placeholder token of the subject; remove the token"
            )

    @property
    def drift_prompts(self) -> tuple[str, ...]:
        """Prompts for which the drift from the base is measured."""
        given, class_prompt = self.validation.drift_prompts, self.preservation.class_prompt
        if self.conditioned is not None:
            return ()
        return given if given is not None else (class_prompt,) if class_prompt else ()

    @property
    def feature_cache_folder(self) -> Path:
        """Folder of the feature caches; by default OUTPUT/feature-cache, or an existing `OUTPUT/feature-bank`."""
        old = self.output / "feature-bank"
        return self.feature_cache.folder or (old if old.is_dir() else self.output / "feature-cache")

    def _is_from_preset(self, name: str) -> bool:
        """Return whether the setting has the value of the preset, which may set what this tuner does not need."""
        settings = PRESETS[self.preset].settings if self.preset is not None else {}
        return name in settings and checked_settings({name: settings[name]})[name] == current_settings()[name].of(self)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Families of the tuner's parts."""
        return (self.tuner,) if isinstance(self.tuner, str) else self.tuner

    @property
    def untrained(self) -> tuple[str, ...]:
        """Families of which the tuner has no part; their settings have no effect."""
        names = (family.name for family in tuner_families())
        return tuple(name for name in names if name not in self.kinds and hasattr(self, name))

    @property
    def parts(self) -> tuple[PartConfig, ...]:
        """Configs of the tuner's parts."""
        return tuple(getattr(self, kind) for kind in self.kinds)

    @property
    def conditioned(self) -> ConditionedConfig | None:
        """Config of the part that takes condition images, if there is one."""
        return next((part for part in self.parts if isinstance(part, ConditionedConfig)), None)

    @property
    def new_words(self) -> tuple[str, ...]:
        """Placeholder tokens of the parts."""
        return tuple(token for part in self.parts for token in part.new_words)

    @property
    def learns_from_text(self) -> bool:
        """Whether a part acts on the text encoders, so that captions are encoded again in each step."""
        return any(part.acts_on_text_encoders for part in self.parts)

    @property
    def learns_from_features(self) -> bool:
        """Whether the tuner is one part that writes only at `out`, and so can be trained on cached features."""
        return len(self.parts) == 1 and self.parts[0].writes_at_out_alone

    @property
    def file(self) -> Path:
        """Path of the finished tuner's file."""
        return self.output / f"{self.name}.safetensors"

    def recorded(self) -> dict[str, Any]:
        """Return the settings that the tuner's file records, as plain JSON values.

        Their names are flat and never change, so that existing files and checkpoints stay readable. Settings of the
        families that are not trained are left out, and so are paths, which describe the user's machine rather than
        the tuner.
        """
        settings = self.model_dump(mode="json")
        recorded: dict[str, Any] = {
            info.record: reduce(getitem, info.place, settings)
            for info in _record_order()
            if info.record is not None
            and (info.recorded_default or info.of(self) != info.field.default)
            and info.name not in self.untrained
            and info.place[0] in settings
        }
        validation = settings["validation"]
        recorded["validation"] = {info.record: validation[name] for name, info in _VALIDATION.items() if info.record}
        if Path(self.base).exists():
            recorded["base"] = Path(self.base).resolve().name
        # Left out without a value, so that the records of earlier releases hold.
        del recorded["vae"]
        unset = [name for name in ("consistency", "consistency_sigma") if recorded[name] is None]
        recorded = {name: value for name, value in recorded.items() if name not in unset}
        if self.vae is not None:
            recorded["vae"] = public_name(self.vae)
        return recorded


@lru_cache(maxsize=8)
def _settings_of(model: type[TrainConfig]) -> Mapping[str, SettingInfo]:
    # The settings of a part that writes only at `out` do not change the cached features that it is trained on.
    families: dict[str, Affects] = {
        name: "tuner" if field.annotation.writes_at_out_alone else "batches"
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, PartConfig)
    }
    return all_settings(model, {"tuner": "batches", **families})


SETTINGS = _settings_of(TrainConfig)
"""Settings by flat name; a field without an `affects` annotation raises an error here."""


def current_settings() -> Mapping[str, SettingInfo]:
    """Return `SETTINGS` and the settings of the tuner families registered by other packages."""
    return _settings_of(with_families(TrainConfig))


_VALIDATION = all_settings(ValidationConfig)
# Positions of two settings in the record, kept as in existing files, where the groups have another order.
_RECORDED_BEFORE = {"gradient_checkpointing": "feature_cache", "drop_encoders": "seed"}


def _record_order() -> list[SettingInfo]:
    settings = current_settings()
    order = list(settings)
    for name, follower in _RECORDED_BEFORE.items():
        order.remove(name)
        order.insert(order.index(follower), name)
    return [settings[name] for name in order]


def checked_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check settings by flat name, each on its own, and convert them to the types of `TrainConfig`.

    Raises:
        RefusedSetting: for the first invalid setting.
    """
    return checked_fields({name: current_settings()[name].field for name in values}, values)


def current_names(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings, of this or another release, under their current flat names."""
    names = {info.record: info.name for info in current_settings().values() if info.record is not None}
    of_validation = {info.record: info.name for info in _VALIDATION.values() if info.record is not None}
    result = {names.get(name, name): value for name, value in recorded.items()}
    validation = result.get("validation")
    if isinstance(validation, Mapping):
        result["validation"] = {of_validation.get(name, name): value for name, value in validation.items()}
    return result
