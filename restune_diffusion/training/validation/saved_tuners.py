"""Find the saved tuners of a run or a sweep; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...storage.header import read_header
from ...utils.errors import RestuneError, TunerFileError
from ..config.config_file import read_config
from ..config.train_config import TrainConfig
from ..output_folder import CONFIG_FILE, best_file, list_checkpoints, step_files


@dataclass(frozen=True)
class SavedTuners:
    """Saved tuners of a run or a sweep.

    Attributes:
        folder: output folder.
        config: settings of the run, or of any run of the sweep.
        files: paths by their names in the folder, in the order of their steps: those of single steps and checkpoints,
            then the best and the finished one.
    """

    folder: Path
    config: TrainConfig
    files: dict[str, Path]


def find_saved_tuners(folder: Path) -> SavedTuners:
    """Find the saved tuners of an output folder.

    Raises:
        RestuneError: if it is not the folder of a run or a sweep, has no saved tuner, holds control tuners, or its
            runs are not those of one sweep.
        SettingsError: if the settings of the run cannot be read.
    """
    if not folder.is_dir():
        raise RestuneError(f"There is no folder {folder}; give the output folder of a training run.")
    runs = (
        [folder]
        if (folder / CONFIG_FILE).is_file()
        else sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    )
    if not runs:
        raise RestuneError(f"{folder} has no {CONFIG_FILE}; give the output folder of a training run or a sweep.")
    # The folder may have been moved since.
    configs = [read_config(run / CONFIG_FILE).model_copy(update={"output": run}) for run in runs]
    _check_comparable(configs)
    files = {str(path.relative_to(folder)): path for config in configs for path in _files(config)}
    if not files:
        raise RestuneError(
            f"{folder} has no saved tuner yet; wait for the end of the run, or save some on the way with --save-every."
        )
    if configs[0].conditioned is not None:
        raise RestuneError(f"{folder} holds control tuners, which generate nothing without condition images.")
    return SavedTuners(folder, configs[0], files)


def _check_comparable(configs: Sequence[TrainConfig]) -> None:
    """Refuse runs that are not those of a sweep: they may have trained on each other's held-out images."""
    first = _compared(configs[0])
    for config in configs[1:]:
        differing = [name for name, value in _compared(config).items() if value != first[name]]
        if differing:
            raise RestuneError(
                f"{configs[0].output} and {config.output} are not runs of one sweep: they differ in "
                f"{' and '.join(differing)}; evaluate the folder of each."
            )


def _compared(config: TrainConfig) -> dict[str, Any]:
    validation = config.validation
    return {
        "base": config.base,
        "vae": config.vae,
        "data": config.data.folder,
        "validation.holdout": validation.holdout,
        "validation.holdout_seed": validation.holdout_seed,
    }


def _files(config: TrainConfig) -> list[Path]:
    """Return the tuner files of a run in the order of their steps; a checkpoint counts if its step has no file."""
    steps = {int(path.stem.removeprefix(f"{config.name}-")): path for path in step_files(config)}
    finished = [path for path in (best_file(config), config.file) if path.is_file()]
    known = {*steps, *(_step(path, config) for path in finished)}
    for checkpoint in list_checkpoints(config.output):
        step, path = int(checkpoint.name.partition("-")[2]), checkpoint / "tuner.safetensors"
        if path.is_file() and step not in known:
            steps[step] = path
    return [steps[step] for step in sorted(steps)] + finished


def _step(path: Path, config: TrainConfig) -> int | None:
    """Return the step of a best or finished file; a run that stopped early finished before the last step."""
    try:
        training = read_header(path).training or {}
    except TunerFileError:
        return config.steps  # the evaluation reports the damaged file
    steps = training.get("steps", config.steps)
    return steps if isinstance(steps, int) else None
