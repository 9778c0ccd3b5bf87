"""Settings of the optimizer, its learning rate and what is kept of the weights."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ...utils.setting_groups import SettingGroup, setting


class OptimizerConfig(SettingGroup):
    """Optimizer, learning rate schedule, gradient clipping and weight averaging."""

    name: Literal["adamw", "adamw8bit", "prodigy", "adafactor", "lion"] = setting(
        "adamw", flat="optimizer", affects="tuner"
    )
    """What moves the weights; all but `adamw` and `adafactor` need pip install 'restune-diffusion[optimizers]'."""
    learning_rate: float = setting(1e-4, affects="tuner", gt=0)
    """Peak learning rate; `lion` wants a third to a tenth of AdamW's, `prodigy` finds its own and wants 1."""
    text_learning_rate: float | None = setting(None, affects="tuner", gt=0)
    """Peak learning rate of the `text` part; that of the others where not given. New words alone want
    more, say 5e-3."""
    weight_decay: float = setting(1e-2, affects="tuner", ge=0)
    """Weight decay of the optimizer."""
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ] = setting("constant", affects="tuner")
    """Course of the learning rate."""
    lr_warmup_steps: int = setting(0, affects="tuner", ge=0)
    """Steps of linear warm-up, for every course but `constant` and `piecewise_constant`."""
    lr_num_cycles: int = setting(1, affects="tuner", gt=0)
    """Cosines of `cosine_with_restarts`."""
    lr_power: float = setting(1.0, affects="tuner", gt=0)
    """Power of `polynomial`."""
    lr_step_rules: str | None = setting(None, affects="tuner", pattern=r"^([\d.]+:\d+,)*[\d.]+$")
    """Factors of `piecewise_constant`, each with the step where it ends: `1:500,0.1:800,0.01`."""
    ema_decay: float | None = setting(None, affects="tuner", gt=0, lt=1)
    """Write and draw with a moving average of the weights that keeps this share in each step; 0.999 is usual."""
    max_grad_norm: float = setting(1.0, affects="tuner", gt=0)
    """Gradients are clipped to this norm."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> OptimizerConfig:
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("a constant learning rate has no warm-up; choose constant_with_warmup")
        if self.lr_warmup_steps and self.lr_scheduler == "piecewise_constant":
            raise ValueError(
                "a piecewise constant learning rate has no warm-up; begin lr_step_rules with lower factors"
            )
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            raise ValueError("lr_step_rules are for the course piecewise_constant, which needs them")
        if self.name == "prodigy" and self.learning_rate < 0.1:
            raise ValueError(
                f"prodigy multiplies the rate that it finds by learning_rate = {self.learning_rate:g}; set it to 1"
            )
        return self
