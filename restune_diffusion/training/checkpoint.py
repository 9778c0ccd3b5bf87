"""Save and restore the whole state of a run, so that a break leaves no trace in the result."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..errors import TrainingError
from ..fileformat import atomic_write, load_tuner, save_tuner, sync_directory
from .facts import library_versions, run_identity
from .optimizer import optimized_names
from .run import Hook, StepReport, TrainingRun

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d{6,})")


class Checkpoints(Hook):
    """Saves a checkpoint every so many steps and at the end, and keeps the newest ones."""

    def on_start(self, run: TrainingRun) -> None:
        """Clear away what a killed process was in the middle of writing."""
        if run.accelerator.is_main_process:
            for pattern in (".checkpoint-*.tmp", ".sample-*.tmp"):
                for remains in run.config.output.glob(pattern):
                    shutil.rmtree(remains)
            for name in (run.config.file.name, "metrics.jsonl"):
                for remains in run.config.output.glob(f".{name}.*.tmp"):
                    remains.unlink()

    def on_step(self, run: TrainingRun, report: StepReport) -> None:
        """Save if it is time."""
        every = run.config.checkpoint_every
        if every and (run.step % every == 0 or run.step == run.config.steps):
            if run.accelerator.is_main_process:
                save_checkpoint(run)
                _prune(run.config.output, run.config.checkpoints_kept)
            run.accelerator.wait_for_everyone()


def list_checkpoints(output: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(output: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, if there is one."""
    return next(reversed(list_checkpoints(output)), None)


def save_checkpoint(run: TrainingRun) -> Path:
    """Write the run's state to `checkpoint-<step>`; the directory appears under this name only when it is whole.

    Raises:
        TunerFileError: if it cannot be written, for instance on a full disk.
    """
    final = run.config.output / f"checkpoint-{run.step:06d}"
    temporary = run.config.output / f".{final.name}.{os.getpid()}.tmp"
    scaler = run.accelerator.scaler
    tensors, groups = _flatten_optimizer(run)
    state = {
        "step": run.step,
        "run": run_identity(run),
        "versions": library_versions(),
        "optimizer_groups": groups,
        "lr_scheduler": run.lr_scheduler.state_dict(),
        "grad_scaler": scaler.state_dict() if scaler is not None else None,
    }
    try:
        save_tuner(run.tuner, temporary / "tuner.safetensors")
        with atomic_write(temporary / "optimizer.safetensors") as file:
            file.write(save(tensors))
        with atomic_write(temporary / "state.json") as file:
            file.write(json.dumps(state, indent=2).encode())
        temporary.rename(final)
        sync_directory(run.config.output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def restore_checkpoint(run: TrainingRun, checkpoint: Path) -> None:
    """Put a run into the state of a checkpoint.

    Raises:
        TrainingError: if the checkpoint is of a run with other settings or data, or is damaged.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        tensors = load((checkpoint / "optimizer.safetensors").read_bytes())
        saved_run, step, versions = state["run"], int(state["step"]), state["versions"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingError(f"{checkpoint} is damaged ({error}); delete it to go on from an older one.") from error
    _check_same_run(checkpoint, saved_run, run_identity(run))
    if step > run.config.steps:
        raise TrainingError(f"{checkpoint} is beyond the {run.config.steps} steps asked for; ask for {step} or more.")
    if versions != library_versions():
        logger.warning("%s was made with %s; the result may differ in the last digits.", checkpoint, versions)
    run.tuner.load_state_dict(load_tuner(checkpoint / "tuner.safetensors").state_dict())
    _restore_optimizer(run, tensors, state["optimizer_groups"])
    run.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["grad_scaler"])
    run.step = step


def _check_same_run(checkpoint: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    for key in [*saved, *(asked.keys() - saved.keys())]:
        if saved.get(key) != asked.get(key):
            raise TrainingError(
                f"{checkpoint} cannot be resumed with {key} = {asked.get(key)}, because it was made with "
                f"{saved.get(key)}; use the same settings and images, or another output folder."
            )


def _flatten_optimizer(run: TrainingRun) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Split the optimizer's state into tensors by parameter name, and plain settings."""
    names = optimized_names(run.optimizer, run.tuner)
    state = run.optimizer.state_dict()
    tensors = {
        f"{names[index]}:{key}": value.detach().cpu().contiguous()
        for index, entries in state["state"].items()
        for key, value in entries.items()
    }
    return tensors, state["param_groups"]


def _restore_optimizer(run: TrainingRun, tensors: dict[str, torch.Tensor], groups: list[dict[str, Any]]) -> None:
    indices = {name: index for index, name in enumerate(optimized_names(run.optimizer, run.tuner))}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name_and_key, value in tensors.items():
        name, key = name_and_key.rsplit(":", 1)
        state.setdefault(indices[name], {})[key] = value
    run.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _prune(output: Path, keep: int) -> None:
    for old in list_checkpoints(output)[:-keep]:
        # Renamed first: a half-deleted directory must not look like a checkpoint.
        doomed = old.with_name(f".{old.name}.{os.getpid()}.tmp")
        old.rename(doomed)
        shutil.rmtree(doomed)
