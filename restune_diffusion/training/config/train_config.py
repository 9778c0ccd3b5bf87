"""Settings of a training run: the CLI's flags, the Python argument and what the tuner's file records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, SerializeAsAny, model_validator

from ...data.config import DataConfig
from ...hooks.placeholder_tokens import contains_token
from ...tuners.configs import BypassConfig, ControlConfig, PartConfig, ResConfig, SkipConfig, TextConfig
from ...tuners.registry import ConditionedConfig, tuner_families, tuner_family
from ...utils.settings import Settings
from ...utils.settings_merge import checked_fields, layered
from .presets import PRESETS, PresetName
from .tuner_settings import FamilyName, checked_families


class ValidationConfig(Settings):
    """Sample images that show how training goes."""

    prompts: tuple[str, ...] = ()
    """Prompts to draw; without any, no samples are made."""
    every: int = Field(default=0, ge=0)
    """Draw every so many steps; 0 draws only at the start and the end."""
    steps: int = Field(default=25, gt=0)
    """Denoising steps of a sample."""
    guidance: float = Field(default=7.5, ge=0)
    """Classifier-free guidance of a sample."""
    seed: int = 0
    """Seed of every sample, so that the images of two steps differ by the training alone."""
    drift_prompts: tuple[str, ...] | None = None
    """Prompts without the subject, for which the drift from the base is told as `leak`, in percent; --class-prompt
    where not given."""
    control_images: tuple[Path, ...] = ()
    """What steers the samples of a control tuner: for each prompt one image for each condition. As in training, these
    are condition images, or pictures to make them from where the condition is made."""


class TrainConfig(DataConfig):
    """Everything that decides a training run. The defaults are the published SCEdit recipe."""

    # Settings of the tuner families of other packages.
    model_config = ConfigDict(extra="allow")
    if not TYPE_CHECKING:  # mypy takes it for an argument
        __pydantic_extra__: dict[str, SerializeAsAny[PartConfig]]

    base: str
    """Stable Diffusion checkpoint in diffusers' layout: a directory, or the id of a hub repository."""
    output: Path
    """Folder for the tuner, the checkpoints, the samples and `metrics.jsonl`."""
    name: str = Field(default="tuner", pattern=r"^[\w][\w.\- ]*$")
    """Name of the tuner; its file is OUTPUT/NAME.safetensors."""
    preset: PresetName | None = None
    """Settings for a purpose, which all others given win over; the manual, docs/training.md, lists them."""

    tuner: FamilyName | tuple[FamilyName, ...] = "skip"
    """Family of the tuner; several make one tuner of several parts. `command_line_class` lists the families."""
    skip: SkipConfig = SkipConfig()
    control: ControlConfig = ControlConfig()
    res: ResConfig = ResConfig()
    bypass: BypassConfig = BypassConfig()
    text: TextConfig = TextConfig()
    control_data: Path | None = None
    """Folder of condition images for a control tuner, named as the training images; for several conditions a folder
    of such folders, named as the conditions. Without it the files that `metadata.jsonl` names under `condition` are
    used, or the condition is made from the image if it is called canny, palette, blur or mask."""

    class_prompt: str | None = None
    """What the subject is one of, said without its word: `a dog` where the captions say `a <dog>`."""
    preservation: Literal["none", "prior", "output"] = "none"
    """What keeps other things of the class from looking like the subject: `prior` trains on class images beside the
    subject's, `output` keeps the base's own predictions for --class-prompt and needs no images."""
    prior_loss_weight: float = Field(default=1.0, gt=0)
    """Weight of the loss that preserves."""
    class_data: Path | None = None
    """Folder of class images for `prior`, OUTPUT/class-images where not given. The base draws what is missing, as many
    steps and with the guidance of the validation samples. Images of your own in it are used as they are."""
    num_class_images: int | None = Field(default=None, gt=0)
    """Number of class images; 100 where not given, or those of your own where the folder has any."""

    steps: int = Field(default=2000, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(default=1, gt=0)
    """Images of one forward pass, per process."""
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    """Forward passes of one optimizer step."""
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "adafactor", "lion"] = "adamw"
    """What moves the weights; all but `adamw` and `adafactor` need pip install 'restune-diffusion[optimizers]'."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate; `lion` wants a third to a tenth of AdamW's, `prodigy` finds its own and wants 1."""
    text_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the `text` part; that of the others where not given. New words alone want
    more, say 5e-3."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Weight decay of the optimizer."""
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ] = "constant"
    """Course of the learning rate."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up, for every course but `constant` and `piecewise_constant`."""
    lr_num_cycles: int = Field(default=1, gt=0)
    """Cosines of `cosine_with_restarts`."""
    lr_power: float = Field(default=1.0, gt=0)
    """Power of `polynomial`."""
    lr_step_rules: str | None = Field(default=None, pattern=r"^([\d.]+:\d+,)*[\d.]+$")
    """Factors of `piecewise_constant`, each with the step where it ends: `1:500,0.1:800,0.01`."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Write and draw with a moving average of the weights that keeps this share in each step; 0.999 is usual."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the base; the tuner's own weights and the image encoder stay in fp32. fp16 is usual
    on a GPU."""
    base_quantization: Literal["int8"] | None = None
    """Hold the linear layers of the base in 8 bits, the tuner in fp32 as ever; needs
    pip install 'restune-diffusion[quantization]'."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples that train with an empty caption."""
    snr_gamma: float | None = Field(default=None, gt=0)
    """Min-SNR weighting of the loss; 5 is usual. On a base that predicts v_prediction it leaves hardly any weight to
    the noisiest steps, where captions matter most."""
    debiased_estimation: bool = False
    """Weigh the loss by 1 / sqrt(SNR), which favours noisy steps."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the base predicts, where its scheduler says it wrongly."""
    rescale_betas_zero_snr: bool = False
    """Train with a last step of pure noise; generation then needs the same, with timestep spacing `trailing`."""
    noise_offset: float = Field(default=0.0, ge=0)
    """Noise that is constant over a channel, for darker and brighter images; 0.05 to 0.1 is usual."""
    input_perturbation: float = Field(default=0.0, ge=0)
    """More noise in the input than the target tells, against exposure bias; 0.1 is usual."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How often each timestep is trained; `logit_normal` favours the middle."""
    logit_mean: float = 0.0
    """Mean of `logit_normal`; above 0 noisier steps are favoured."""
    logit_std: float = Field(default=1.0, gt=0)
    """Spread of `logit_normal`."""
    min_timestep: int = Field(default=0, ge=0)
    """First timestep to train; timestep 0 is nearly free of noise."""
    max_timestep: int | None = Field(default=None, gt=0)
    """Where the timesteps to train end; this one itself is not trained. The base's last where not given."""
    gradient_checkpointing: bool = False
    """Compute the base's activations twice instead of keeping them: less memory, slower."""
    feature_bank: int | None = Field(default=None, gt=0)
    """For a `bypass` tuner: compute what the base makes of so many draws of noise and timestep per image once, keep it
    on the disk, and train from there without the base. Fewer draws cost quality; the disk use is said before."""
    feature_bank_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Precision of the feature bank on the disk."""
    feature_bank_dir: Path | None = None
    """Folder for feature banks, which several runs may share; OUTPUT/feature-bank where not given."""
    sweep: str | None = None
    """Train a tuner for each combination of settings, on one set of encoded images: "ratio=0.1,0.25 lr=1e-4,5e-4".
    Each is a run of its own in OUTPUT/NAME-ratio0.1-lr1e-4; bypass tuners share every pass of the base."""
    drop_encoders: bool = False
    """Free the memory of the autoencoder and text encoder once the data is encoded; no samples can be drawn then."""
    seed: int = 0
    """Seed of everything that is drawn at random."""
    cpu: bool = False
    """Train on the CPU even where there is a GPU."""

    validation: ValidationConfig = ValidationConfig()
    checkpoint_every: int = Field(default=500, ge=0)
    """Save the state of the run every so many steps; 0 never does."""
    checkpoints_kept: int = Field(default=2, gt=0)
    """Number of checkpoints that are kept."""
    resume: bool = False
    """Go on from the newest checkpoint in OUTPUT; the result is the same as without the break."""
    log_with: Literal["auto", "tensorboard", "wandb", "none"] = "auto"
    """Where to log beside `metrics.jsonl`: to TensorBoard in OUTPUT/logs, where it is installed (`auto`), or to
    Weights & Biases, which sends the log over the network."""

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        return checked_families(cls, values) if isinstance(values, dict) else values

    @model_validator(mode="before")
    @classmethod
    def _on_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        # An unknown one is refused with the other fields.
        return layered(PRESETS[name].settings, values) if isinstance(name, str) and name in PRESETS else values

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
        self._check_learning_rate()
        if self.debiased_estimation and self.snr_gamma is not None:
            raise ValueError("the loss has one weighting; choose snr_gamma or debiased_estimation")
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError("min_timestep must be below max_timestep")
        if self.feature_bank is not None and not self.learns_from_features:
            raise ValueError(
                "a feature bank is for a tuner of a bypass part alone, whose gradient never enters the base; "
                "leave feature_bank out, or train a bypass"
            )
        if self.feature_bank is not None and (self.bucketing or self.preservation != "none"):
            raise ValueError("a feature bank is for images of one size without preservation; leave one of them out")
        if self.drop_encoders and self.validation.prompts:
            raise ValueError("validation prompts need the encoders; leave drop_encoders or the prompts out")
        return self

    def _check_learning_rate(self) -> None:
        given = self.text_learning_rate is not None and not self._is_from_preset("text_learning_rate")
        if given and not self.learns_from_text:
            raise ValueError("a text learning rate is given, but the tuner to train has no text part")
        if self.drop_encoders and self.learns_from_text:
            raise ValueError("a text part is trained in the text encoders; leave drop_encoders out")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("a constant learning rate has no warm-up; choose constant_with_warmup")
        if self.lr_warmup_steps and self.lr_scheduler == "piecewise_constant":
            raise ValueError(
                "a piecewise constant learning rate has no warm-up; begin lr_step_rules with lower factors"
            )
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            raise ValueError("lr_step_rules are for the course piecewise_constant, which needs them")
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            raise ValueError(
                f"prodigy multiplies the rate that it finds by learning_rate = {self.learning_rate:g}; set it to 1"
            )

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
        if self.preservation == "none" and (self.class_data, self.num_class_images, self.prior_loss_weight) != (
            None, None, 1.0,
        ):  # fmt: skip
            raise ValueError("settings of preservation are given; choose one, `--preservation prior` or `output`")
        if self.preservation == "output" and (self.class_data, self.num_class_images) != (None, None):
            raise ValueError("output preservation needs no class images; leave them out, or choose `prior`")
        if self.preservation != "none" and not (self.class_prompt and self.class_prompt.strip()):
            raise ValueError('preservation needs to know the class; give --class-prompt, for instance "a dog"')
        if self.preservation == "prior" and self.conditioned is not None:
            raise ValueError("class images have no condition images for a control tuner; choose output preservation")
        if self.validation.drift_prompts and self.conditioned is not None:
            raise ValueError("a control tuner draws nothing without its images, so that no leak can be told")
        if self.class_prompt and self.new_words and contains_token(self.class_prompt, self.new_words):
            raise ValueError(f"the class prompt {self.class_prompt!r} has the subject's own word; leave it out there")

    @property
    def drift_prompts(self) -> tuple[str, ...]:
        """Prompts for which the drift from the base is told."""
        asked = self.validation.drift_prompts
        if self.conditioned is not None:
            return ()
        return asked if asked is not None else (self.class_prompt,) if self.class_prompt else ()

    def _is_from_preset(self, name: str) -> bool:
        """Tell whether a preset says the same; it may set what another kind of tuner does not need."""
        settings = PRESETS[self.preset].settings if self.preset is not None else {}
        return name in settings and checked_fields(TrainConfig, {name: settings[name]})[name] == getattr(self, name)

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

        Left out are the settings of the kinds of tuner that are not trained, and paths, which say more about a
        person's machine than about the tuner.
        """
        paths = {
            "data",
            "mask_data",
            "output",
            "control_data",
            "class_data",
            "feature_bank_dir",
            "sweep",
            "resume",
            "cpu",
        }
        settings = self.model_dump(mode="json", exclude=paths | set(self.untrained))
        del settings["validation"]["control_images"]
        if Path(self.base).exists():
            settings["base"] = Path(self.base).resolve().name
        return settings
