"""Optimizer, learning rate and weight averaging settings."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ...utils.setting_groups import SettingGroup, setting


class OptimizerConfig(SettingGroup):
    """Optimizer, learning rate schedule, gradient clipping and weight averaging."""

    name: Literal["adamw", "adamw8bit", "prodigy", "adafactor", "lion"] = setting(
        "adamw", flat="optimizer", affects="tuner"
    )
    """Optimizer. `adamw8bit` and `lion` need pip install 'restune-diffusion[optimizers]'."""
    learning_rate: float = setting(1e-4, affects="tuner", gt=0)
    """Peak learning rate. `lion` needs a third to a tenth of AdamW's; `prodigy` adapts its own and needs 1."""
    text_learning_rate: float | None = setting(None, affects="tuner", gt=0)
    """Peak learning rate of the `text` part. If not set, --learning-rate. Placeholder tokens without LoRA need a
    higher rate, for instance 5e-3. With `prodigy`, a factor on the rate that it finds for all parts."""
    weight_decay: float = setting(1e-2, affects="tuner", ge=0)
    """Weight decay."""
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ] = setting("constant", affects="tuner")
    """Learning rate schedule."""
    lr_warmup_steps: int = setting(0, affects="tuner", ge=0)
    """Steps of linear warm-up, for every schedule except `constant` and `piecewise_constant`."""
    lr_num_cycles: int = setting(1, affects="tuner", gt=0)
    """Number of cycles of `cosine_with_restarts`."""
    lr_power: float = setting(1.0, affects="tuner", gt=0)
    """Power of the `polynomial` schedule."""
    lr_step_rules: str | None = setting(
        None,
        affects="tuner",
        pattern=r"^([\d.]+:\d+,)*[\d.]+$",
        expected="factors with the steps at which they end, and a last factor, such as 1:500,0.1:800,0.01",
    )
    """Factors on the learning rate for `piecewise_constant`, each with the step at which it ends, for instance
    `1:500,0.1:800,0.01`."""
    ema_decay: float | None = setting(None, affects="tuner", gt=0, lt=1)
    """Decay of an exponential moving average (EMA) of the weights, which the tuner's file and the validation samples
    use; 0.999 is usual. If not set, no average is kept."""
    max_grad_norm: float = setting(1.0, affects="tuner", gt=0)
    """Maximum gradient norm; larger gradients are clipped."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> OptimizerConfig:
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("a constant learning rate has no warm-up; set lr_scheduler to constant_with_warmup")
        if self.lr_warmup_steps and self.lr_scheduler == "piecewise_constant":
            raise ValueError(
                "a piecewise constant learning rate has no warm-up; begin lr_step_rules with lower factors"
            )
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            raise ValueError(
                "lr_step_rules and lr_scheduler = piecewise_constant need each other; set both or neither"
            )
        if self.name == "prodigy" and self.learning_rate < 0.1:
            raise ValueError(
                f"prodigy multiplies its adaptive rate by learning_rate = {self.learning_rate:g}; set it to 1"
            )
        return self
