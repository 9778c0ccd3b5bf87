"""What is recorded about a run: in its checkpoints, to tell runs apart, and in the tuner's file, for its readers."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from ..utils.settings_merge import flat
from ..utils.version import __version__
from .config.shared_settings import identity_settings
from .config.train_config import TrainConfig
from .state import TrainState

# Courses of the learning rate that do not depend on the number of steps, so that a run may be prolonged.
_ENDLESS = ("constant", "constant_with_warmup", "piecewise_constant")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the arithmetic."""
    return {"restune-diffusion": __version__, **{name: version(name) for name in ("torch", "diffusers")}}


def run_identity(run: TrainState) -> dict[str, Any]:
    """Return all that decides the result of a run, flat, under the names of the settings."""
    settings = identity_settings(run.config)
    # Named last, because it only matters for some courses of the learning rate, which are told first if they differ.
    steps = settings.pop("steps")
    # A caption that comes from the prompt is part of the data's hash.
    del settings["prompt"]
    settings["resolution"] = run.resolution
    settings["images and captions"] = run.cache.data_hash
    if run.preservation is not None:
        settings["class images or prompt"] = run.preservation.identity
    settings["number of processes"] = run.accelerator.num_processes
    if run.config.optimizer.lr_scheduler not in _ENDLESS:
        settings["steps"] = steps
    return dict(flat(settings))


def training_facts(run: TrainState) -> dict[str, Any]:
    """Return what the tuner's file says about its training; no path of this machine is among it."""
    return {
        "steps": run.step,
        "images": len(run.cache),
        "images_seen": run.step * run.images_per_step,
        "data_hash": run.cache.data_hash,
        "resolution": run.resolution,
        "prediction_type": run.objective.prediction_type,
        **({"trigger_words": words} if (words := trigger_words(run.config)) else {}),
        "versions": library_versions(),
        "config": run.config.recorded(),
    }


def trigger_words(config: TrainConfig) -> list[str]:
    """Return the words that call what a run trains: the new ones of its text part, and that of its captions."""
    words, trigger_word = list(config.new_words), config.data.trigger_word
    return words if trigger_word is None or trigger_word in words else [*words, trigger_word]
