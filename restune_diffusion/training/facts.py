"""Recorded facts about a run: its identity in checkpoints, and the training facts in the tuner's file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..utils.settings_merge import flat
from ..utils.version import library_versions
from .config.shared_settings import identity_settings
from .state import TrainState

# Learning rate schedules that do not depend on the number of steps, so that a run may be extended.
_ENDLESS = ("constant", "constant_with_warmup", "piecewise_constant")


def run_identity(run: TrainState) -> dict[str, Any]:
    """Return everything that determines the result of a run, as a flat mapping by setting name."""
    settings = identity_settings(run.config)
    # Added last: it matters only for some learning rate schedules, and a different schedule is reported first.
    steps = settings.pop("steps")
    # A caption from the prompt is part of the data hash.
    del settings["prompt"]
    settings["resolution"] = run.resolution
    # Before the data, which may be latents that the teacher changes.
    if run.teacher is not None:
        record = run.teacher.record
        settings["teacher"] = f"{record.sha256} with weight {record.weight:g} and loss weight {record.loss_weight:g}"
    settings["images and captions"] = run.cache.data_hash
    if run.preservation is not None:
        settings["class images or prompt"] = run.preservation.identity
    if run.initial is not None:
        settings["initial tuner"] = run.initial.sha256
    if run.vae is not None:
        settings["VAE weights"] = run.vae
    if run.held_out is not None:
        settings["held-out images and captions"] = run.held_out.cache.data_hash
    settings["number of processes"] = run.accelerator.num_processes
    if run.config.optimizer.lr_scheduler not in _ENDLESS:
        settings["steps"] = steps
    return dict(flat(settings))


def training_facts(run: TrainState) -> dict[str, Any]:
    """Return the training facts for the tuner's file; they contain no local paths."""
    return {
        "steps": run.step,
        "images": 0 if run.config.teacher.generates else len(run.cache),
        "images_seen": run.step * run.images_per_step,
        "data_hash": run.cache.data_hash,
        "resolution": run.resolution,
        "prediction_type": run.objective.prediction_type,
        **({"initial_tuner": asdict(run.initial)} if run.initial is not None else {}),
        **({"teacher": run.teacher.record.as_json()} if run.teacher is not None else {}),
        **({"trigger_words": triggers} if (triggers := trigger_words(run)) else {}),
        **({"vae_sha256": run.vae} if run.vae is not None else {}),
        **({"held_out_images": len(run.held_out.cache)} if run.held_out is not None else {}),
        **({"stopped_early": run.stopped_early} if run.stopped_early is not None else {}),
        "versions": library_versions(),
        "config": run.config.recorded(),
    }


def trigger_words(run: TrainState) -> list[str]:
    """Return the trigger words: placeholder tokens of the text part, that of the data, and those of the teacher."""
    config = run.config
    words = [*config.new_words, *([config.data.trigger_word] if config.data.trigger_word is not None else [])]
    return list(dict.fromkeys([*words, *(run.teacher.record.trigger_words if run.teacher is not None else ())]))
