"""Save and restore the complete training state, so that a resumed run gives the same result."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from ..data.data_sheet import FILE_NAME as DATA_FILE
from ..storage.tuner_file import load_tuner, save_tuner
from ..utils.atomic_write import atomic_write, sync_directory
from ..utils.errors import TrainingError
from ..utils.library_versions import library_versions
from .callbacks.base import Callback
from .callbacks.metrics_file import METRICS_FILE
from .config.train_config import current_names
from .facts import run_identity
from .optimization.optimizer_state import flatten_state, unflatten_state, with_own_kernels
from .optimization.parameter_groups import optimized_names
from .output_folder import CONFIG_FILE, best_file, list_checkpoints
from .state import InitialTuner, StepReport, TrainState
from .validation.measurements import Measurements

logger = logging.getLogger(__name__)

_BEST = "best.safetensors"


class Checkpoints(Callback):
    """Callback that saves a checkpoint every N steps and at the end, and keeps the newest ones."""

    def on_start(self, run: TrainState) -> None:
        """Remove temporary files and folders that an interrupted process left behind."""
        if run.accelerator.is_main_process:
            for pattern in (".checkpoint-*.tmp", ".sample-*.tmp"):
                for leftover in run.config.output.glob(pattern):
                    shutil.rmtree(leftover)
            step_files = f"{run.config.name}-*.safetensors"
            best = best_file(run.config).name
            for name in (run.config.file.name, step_files, best, METRICS_FILE, DATA_FILE, CONFIG_FILE):
                for leftover in run.config.output.glob(f".{name}.*.tmp"):
                    leftover.unlink()

    def reads_state(self, run: TrainState, step: int) -> bool:
        """Return whether a checkpoint is due: every `checkpoints.every` steps and after the last step."""
        every = run.config.checkpoints.every
        return bool(every) and (step % every == 0 or step == run.steps)

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Save a checkpoint if one is due, and after the last step of a run that stops early."""
        if self.reads_state(run, report.step) or (run.stopped_early and run.config.checkpoints.every):
            self._save(run)

    def on_stop(self, run: TrainState) -> None:
        """Save a checkpoint when training is interrupted."""
        self._save(run)

    def _save(self, run: TrainState) -> None:
        if run.accelerator.is_main_process:
            if not checkpoint_folder(run).exists():
                save_checkpoint(run)
            _prune(run.config.output, run.config.checkpoints.kept)
        run.accelerator.wait_for_everyone()


def checkpoint_folder(run: TrainState) -> Path:
    """Return the checkpoint folder of the current step."""
    return run.config.output / f"checkpoint-{run.step:06d}"


def save_checkpoint(run: TrainState) -> Path:
    """Write the training state to `checkpoint-<step>`; the folder gets this name only when it is complete.

    Raises:
        TunerFileError: if the checkpoint cannot be written, for instance because the disk is full.
    """
    final = checkpoint_folder(run)
    temporary = run.config.output / f".{final.name}.{os.getpid()}.tmp"
    scaler = run.accelerator.scaler
    optimizer = run.optimizer.state_dict()
    tensors, values = flatten_state(optimizer["state"], optimized_names(run.optimizer, run.tuner))
    averages, average_settings = run.average.state() if run.average is not None else ({}, None)
    state = {
        "step": run.step,
        "run": run_identity(run),
        "versions": library_versions(),
        "optimizer_groups": optimizer["param_groups"],
        "optimizer_values": values,
        "average": average_settings,
        "lr_scheduler": run.lr_scheduler.state_dict(),
        "grad_scaler": scaler.state_dict() if scaler is not None else None,
        "measurements": run.measurements.as_json(),
    }
    try:
        save_tuner(run.tuner, temporary / "tuner.safetensors")
        with atomic_write(temporary / "optimizer.safetensors") as file:
            file.write(save(tensors))
        if averages:
            with atomic_write(temporary / "average.safetensors") as file:
                file.write(save(averages))
        if run.config.checkpoints.keep == "best" and best_file(run.config).exists():
            shutil.copyfile(best_file(run.config), temporary / _BEST)
        with atomic_write(temporary / "state.json") as file:
            file.write(json.dumps(state, indent=2).encode())
        temporary.rename(final)
        sync_directory(run.config.output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def restore_checkpoint(run: TrainState, checkpoint: Path) -> None:
    """Load a checkpoint into the training state.

    Raises:
        TrainingError: if the checkpoint belongs to a run with other settings or data, or is damaged.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        tensors = load((checkpoint / "optimizer.safetensors").read_bytes())
        averages = load((checkpoint / "average.safetensors").read_bytes()) if state["average"] else {}
        saved_run, step, versions = state["run"], int(state["step"]), state["versions"]
        # Checkpoints of earlier releases have none.
        measurements = Measurements.from_json(state.get("measurements", []))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingError(
            f"{checkpoint} is damaged ({error}); delete it to resume from an older checkpoint."
        ) from error
    if run.config.init_tuner is not None and run.initial is None and "initial tuner" in saved_run:
        # The file is gone, and its weights are part of those of the checkpoint.
        run.initial = InitialTuner(run.config.init_tuner.name, saved_run["initial tuner"])
    _check_same_run(checkpoint, saved_run, run_identity(run))
    if step > run.steps:
        raise TrainingError(f"{checkpoint} is beyond the requested {run.steps} steps; set steps to {step} or more.")
    if versions != library_versions():
        logger.warning("%s was made with %s; the result may differ in the last digits.", checkpoint, versions)
    run.tuner.load_state_dict(load_tuner(checkpoint / "tuner.safetensors").state_dict())
    entries = unflatten_state({**tensors, **state["optimizer_values"]}, optimized_names(run.optimizer, run.tuner))
    groups = with_own_kernels(state["optimizer_groups"], run.optimizer.param_groups)
    run.optimizer.load_state_dict({"state": entries, "param_groups": groups})
    if run.average is not None:
        run.average.load_state(averages, state["average"])
    run.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["grad_scaler"])
    if (checkpoint / _BEST).exists() and run.config.checkpoints.keep == "best" and run.accelerator.is_main_process:
        # A file of a later step, of which the checkpoint knows nothing, would stay if its measurement did not recur.
        with atomic_write(best_file(run.config)) as file:
            file.write((checkpoint / _BEST).read_bytes())
    run.measurements = measurements
    run.step = step
    run.resumed_from = checkpoint


def _check_same_run(checkpoint: Path, saved: dict[str, Any], requested: dict[str, Any]) -> None:
    # Each release may record settings under other names.
    saved, requested = current_names(saved), current_names(requested)
    for key in [*saved, *(requested.keys() - saved.keys())]:
        if saved.get(key) != requested.get(key):
            raise TrainingError(
                f"{checkpoint} cannot be resumed with {key} = {requested.get(key)}, because it was made with "
                f"{saved.get(key)}; use the same settings and images, or another output folder."
            )


def _prune(output: Path, keep: int) -> None:
    for old in list_checkpoints(output)[:-keep]:
        # Renamed first: a half-deleted directory must not look like a checkpoint.
        doomed = old.with_name(f".{old.name}.{os.getpid()}.tmp")
        old.rename(doomed)
        shutil.rmtree(doomed)
