"""Callbacks that write finished tuner files: one at the end, and one every N steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...storage.tuner_file import save_tuner
from ..facts import training_facts, trigger_words
from ..output_folder import step_files
from ..state import StepReport, TrainState
from .base import Callback


class FinalFile(Callback):
    """Callback that writes the file of the finished tuner."""

    def on_end(self, run: TrainState) -> None:
        """Write the tuner's file."""
        write_file(run, run.config.file)


class StepFiles(Callback):
    """Callback that writes a finished tuner file every `save_every` steps, and keeps the last ones.

    Place it before `Checkpoints`: a saved step then implies that its file exists, so a resumed run misses none. A file
    of a step that is repeated is replaced by the same tuner.
    """

    def reads_state(self, run: TrainState, step: int) -> bool:
        """Return whether a file is due; that of the last step is the finished tuner."""
        every = run.config.checkpoints.save_every
        return bool(every) and step % every == 0 and step < run.steps

    def on_step(self, run: TrainState, report: StepReport) -> None:
        """Write the file of the step if it is due."""
        config, kept = run.config, run.config.checkpoints.keep_last
        if self.reads_state(run, report.step):
            write_file(run, config.output / f"{config.name}-{run.step:06d}.safetensors")
            if kept is not None and run.accelerator.is_main_process:
                for old in step_files(config)[:-kept]:
                    old.unlink(missing_ok=True)


def write_file(run: TrainState, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write the tuner with its released weights and the facts of its training, in the main process.

    Args:
        run: state of the run.
        path: path of the file.
        facts: further facts.
    """
    if run.accelerator.is_main_process:
        with run.released_weights():
            triggers = trigger_words(run.config)
            metadata = {"modelspec.trigger_phrase": ", ".join(triggers)} if triggers else {}
            save_tuner(run.tuner, path, training={**training_facts(run), **(facts or {})}, metadata=metadata)
    run.accelerator.wait_for_everyone()
