"""Translate the flags of diffusers' training scripts, so that existing commands need few changes."""

from __future__ import annotations

from collections.abc import Sequence

_OURS = {
    "pretrained_model_name_or_path": ("--base",),
    "instance_data_dir": ("--data",),
    "train_data_dir": ("--data",),
    "instance_prompt": ("--prompt",),
    "class_data_dir": ("--class-data",),
    "with_prior_preservation": ("--preservation", "prior"),
    "output_dir": ("--output",),
    "max_train_steps": ("--steps",),
    "train_batch_size": ("--batch-size",),
    "adam_weight_decay": ("--weight-decay",),
    "use_8bit_adam": ("--optimizer", "adamw8bit"),
    "checkpointing_steps": ("--checkpoint-every",),
    "checkpoints_total_limit": ("--checkpoints-kept",),
    "validation_prompt": ("--validation.prompts",),
    "validation_prompts": ("--validation.prompts",),
    "validation_steps": ("--validation.every",),
    "report_to": ("--log-with",),
}


def from_diffusers(arguments: Sequence[str]) -> list[str]:
    """Return arguments with diffusers' flags replaced by ours: `--instance_prompt X` or `--max_train_steps=400`."""
    renamed: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        ours = _OURS.get(flag[2:].replace("-", "_")) if flag.startswith("--") else None
        renamed += [argument] if ours is None else [*ours[:-1], ours[-1] + equals + value]
    return renamed
