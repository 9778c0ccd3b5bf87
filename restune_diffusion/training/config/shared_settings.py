"""Which settings leave the training batches, and so a pass of the base, as they are."""

from __future__ import annotations

from typing import Any

from .train_config import TrainConfig

OF_THE_TUNER = frozenset(
    {
        "bypass",
        "optimizer",
        "learning_rate",
        "text_learning_rate",
        "weight_decay",
        "lr_scheduler",
        "lr_warmup_steps",
        "lr_num_cycles",
        "lr_power",
        "lr_step_rules",
        "ema_decay",
        "max_grad_norm",
        "snr_gamma",
        "debiased_estimation",
        "steps",
    }
)
"""Settings that change what is learnt from a batch, but not the batch."""
OF_THE_OUTPUT = frozenset(
    {
        "name",
        "preset",
        "validation",
        "checkpoint_every",
        "checkpoints_kept",
        "log_with",
        "drop_encoders",
        "gradient_checkpointing",
    }
)
"""Settings that change neither."""


def batch_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings on which the batches of a tuner that learns from features may depend, as plain JSON values.

    These are all but the ones known not to matter, so that a new setting is taken for one that does.
    """
    settings = config.recorded()
    immaterial = OF_THE_TUNER | OF_THE_OUTPUT | set(config.kinds)
    return {name: value for name, value in settings.items() if name not in immaterial}
