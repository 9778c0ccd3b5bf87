"""Initial weights of a training run from a tuner file, which must fit the tuner to train and the base."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import Any

import torch

from ..backbones import describe_base, describe_text, text_encoders
from ..storage.tuner_file import TunerInfo, load_tuner, read_info
from ..tuners.registry import PartConfig
from ..tuners.tuner import Tuner
from ..utils.errors import BaseMismatchError, TrainingError
from .config.train_config import TrainConfig
from .output_folder import latest_checkpoint
from .state import InitialTuner


def check_initial_tuner(config: TrainConfig, pipeline: Any = None) -> None:
    """Check the file of `init_tuner` from its header, and against a pipeline if one is given.

    Raises:
        TunerFileError: if the file is missing or not a tuner file.
        TrainingError: if its parts or their settings differ from those of the tuner to train.
        BaseMismatchError: if it is for a base of another structure.
    """
    path = _needed(config)
    if path is None:
        return
    info = read_info(path)
    _check_parts(path, info, config)
    if pipeline is not None:
        try:
            info.base.check_fits(describe_base(pipeline.unet))
            if info.base.text:
                info.base.check_text_fits(describe_text(text_encoders(pipeline)))
        except BaseMismatchError as error:
            raise BaseMismatchError(f"{path} cannot start this run: {error}") from error


def load_initial_tuner(config: TrainConfig, tuner: Tuner) -> InitialTuner | None:
    """Copy the weights of `init_tuner` into a tuner; returns None without a file, or if a resumed run lost it."""
    path = _needed(config)
    if path is None:
        return None
    tuner.load_state_dict(load_tuner(path, dtype=torch.float32).state_dict())
    return InitialTuner(path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def _needed(config: TrainConfig) -> Path | None:
    """Return the file to start from; a resumed run has the weights in its checkpoint and does not need the file."""
    path = config.init_tuner.expanduser() if config.init_tuner is not None else None
    resumed = config.checkpoints.resume and latest_checkpoint(config.output) is not None
    return None if path is None or (resumed and not path.is_file()) else path


def _check_parts(path: Path, info: TunerInfo, config: TrainConfig) -> None:
    flags = _flags(info.configs)
    kinds = tuple(part.part for part in info.configs)
    if kinds != config.kinds:
        raise TrainingError(
            f"{path} is a tuner of the family {' + '.join(kinds)}, but the tuner to train is "
            f"{' + '.join(config.kinds)}; add {flags}."
        )
    for ours, theirs in zip(config.parts, info.configs, strict=True):
        wanted, found = ours.model_dump(mode="json"), theirs.model_dump(mode="json")
        for name, value in wanted.items():
            if name not in ours.only_initial and value != found[name]:
                raise TrainingError(
                    f"{path} has {ours.part}.{name} = {_shown(found[name])}, but the tuner to train has "
                    f"{_shown(value)}; train with the settings of the file, {flags} and no others of the part."
                )


def _flags(parts: tuple[PartConfig, ...]) -> str:
    """Return the flags that train a tuner with these parts."""
    flags = ["--tuner", *(part.part for part in parts)]
    for part in parts:
        defaults = type(part).model_construct().model_dump(mode="json", warnings=False)
        for name, value in part.model_dump(mode="json").items():
            if value != defaults.get(name):
                values = value if isinstance(value, list) else [value]
                flags += [f"--{part.part}.{name.replace('_', '-')}", shlex.join(map(str, values))]
    return " ".join(flags)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
