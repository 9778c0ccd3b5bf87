"""Training of several tuners on one base and one set of encoded images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from ...utils.display import counted
from ...utils.errors import TrainingError, TrainingInterrupted
from ..advice import warnings_of
from ..build import build_accelerator, build_training_state
from ..callbacks.base import Callback
from ..callbacks.reporting import Progress, describe_plan
from ..callbacks.tracking import start_trackers
from ..callbacks.validation import ValidationSamples
from ..config.shared_settings import batch_settings
from ..config.train_config import TrainConfig
from ..feature_cache.shared_pass import share_passes
from ..feature_cache.use import use_feature_cache
from ..initial_tuner import check_initial_tuner
from ..inputs import TrainingInputs, prepared
from ..loop import steps_of
from ..output_folder import check_output
from ..state import StepReport, TrainState
from ..stopping import StopRequest
from ..trainer import acting, run_callbacks
from .grid import Variant, parse_sweep
from .report import SweepResult, SweepRow, comparison, final_loss, last_validation_loss, write_summary


@dataclass(eq=False)
class _Member:
    """One tuner of a sweep: its training run, callbacks, and error if it stopped."""

    variant: Variant
    run: TrainState
    samples: ValidationSamples
    callbacks: list[Callback] = field(default_factory=list)
    error: str | None = None


def sweep(
    config: TrainConfig,
    *,
    pipeline: Any = None,
    on_progress: Callable[[str, StepReport], None] | None = None,
    verbose: bool = True,
    stop_on_signal: bool = False,
) -> SweepResult:
    """Train a tuner for each combination of settings in `config.sweep`; each equals the tuner trained alone.

    Every tuner is a separate run with its own folder, checkpoints and metrics. Bypass tuners with the same batches
    share the base's forward passes; all others are trained one after another. A tuner that diverges is stopped, and
    the others continue.

    Args:
        config: all settings.
        pipeline: a loaded text-to-image pipeline to train on, as in `train`.
        on_progress: called after every step of each tuner, with the tuner's name.
        verbose: whether to print the plan and a progress bar.
        stop_on_signal: whether SIGTERM and the first Ctrl-C stop training after the step, with checkpoints.

    Returns:
        A row for each tuner, also written to OUTPUT/sweep.json.

    Raises:
        TrainingError: if the sweep is invalid or cannot start, or all its tuners diverged.
        TrainingInterrupted: if a signal stopped it.
        DataError: if the images or captions cannot be used.
        TunerFileError: if a file cannot be written.
    """
    started = time.perf_counter()
    variants = parse_sweep(config)
    for variant in variants:
        check_output(variant.config)
        check_initial_tuner(variant.config)
    accelerators = [build_accelerator(variant.config) for variant in variants]
    with prepared(config, accelerators[0], pipeline, verbose=verbose) as inputs, ExitStack() as stack:
        for accelerator in accelerators:
            stack.callback(accelerator.end_training)
        start: list[Image.Image] | None = [] if starts_as_base(config) else None
        members = [
            _Member(
                variant,
                build_training_state(variant.config, accelerator, inputs),
                ValidationSamples(inputs.control_images, start),
            )
            for variant, accelerator in zip(variants, accelerators, strict=True)
        ]
        groups = _grouped(members)
        if verbose:
            accelerators[0].print(_plan(members, groups))
        left = sum(member.run.steps - member.run.step for member in members)
        shown = verbose and accelerators[0].is_main_process
        bar = stack.enter_context(tqdm(total=left, unit="step", desc=config.name, disable=not shown))
        for member in members:
            name = member.run.config.name
            user_callbacks = [Progress(partial(on_progress, name))] if on_progress is not None else []
            member.callbacks = [
                *run_callbacks(inputs, member.samples, [Progress(partial(_advance, bar, name))]),
                *user_callbacks,
            ]
            start_trackers(member.run.accelerator, member.run.config)
        stop = StopRequest()
        with stop.listening() if stop_on_signal else nullcontext():
            for group in groups:
                _train_group(group, inputs, stop, verbose)
    result = SweepResult(
        tuple(_row(member) for member in members), config.output / "sweep.json", time.perf_counter() - started
    )
    return _finished(config, members, result)


def starts_as_base(config: TrainConfig) -> bool:
    """Return whether all tuners generate the base's images before their first step.

    New placeholder tokens change them, and so does a tuner file to start from.
    """
    return config.init_tuner is None and not config.learns_from_text


def _grouped(members: Sequence[_Member]) -> list[list[_Member]]:
    """Group the tuners that can share all forward passes of the base."""
    groups: dict[str, list[_Member]] = {}
    for number, member in enumerate(members):
        config = member.run.config
        alone = f"#{number}"
        # Preservation runs the base with the tuner on other prompts, which needs separate forward passes.
        together = config.learns_from_features and config.preservation.method == "none"
        key = json.dumps(batch_settings(config)) if together else alone
        groups.setdefault(key, []).append(member)
    return list(groups.values())


def _plan(members: Sequence[_Member], groups: Sequence[Sequence[_Member]]) -> str:
    sharing = [len(group) for group in groups if len(group) > 1]
    together = f", {' and '.join(map(str, sharing))} of them share the base's forward passes" if sharing else ""
    lines = [f"sweep       {counted(len(members), 'tuner')}{together}; the first one:", describe_plan(members[0].run)]
    of_first = set(warnings_of(members[0].run))
    for member in members[1:]:
        further = [warning for warning in warnings_of(member.run) if warning not in of_first]
        lines += [f"warning     {member.run.config.name}: {warning}" for warning in further]
    return "\n".join(lines)


def _advance(bar: Any, name: str, report: StepReport) -> None:
    bar.set_postfix_str(f"{name}, step {report.step}, loss {report.loss:.4f}", refresh=False)
    bar.update()


def _train_group(group: Sequence[_Member], inputs: TrainingInputs, stop: StopRequest, verbose: bool) -> None:
    runs = [member.run for member in group]
    if runs[0].config.feature_cache.draws is not None:
        use_feature_cache(runs, inputs.models, verbose)
    elif len(runs) > 1:
        share_passes(runs)
    with acting(runs[0]) if len(runs) == 1 else nullcontext():
        _take_turns(group, stop)


def _take_turns(group: Sequence[_Member], stop: StopRequest) -> None:
    """Train the tuners in turn, step by step; after an interruption, those that are behind catch up first.

    Raises:
        TrainingInterrupted: if `stop` was requested; all tuners have saved their state by then.
    """
    steps_by_member = {member: steps_of(member.run, member.callbacks, stop) for member in group}
    interrupted: TrainingInterrupted | None = None
    try:
        while steps_by_member:
            member = min(steps_by_member, key=lambda each: each.run.step)
            try:
                if next(steps_by_member[member], None) is None:
                    del steps_by_member[member]
            except TrainingInterrupted as stopped:
                interrupted = stopped
                del steps_by_member[member]
            except TrainingError as error:
                member.error = str(error)
                del steps_by_member[member]
    finally:
        for steps in steps_by_member.values():
            steps.close()
    if interrupted is not None:
        output = group[0].run.config.output.parent
        raise TrainingInterrupted(
            f"Stopped by a signal. The state of every started tuner is saved in {output}; "
            f"run the same command with --resume to continue.",
            by_ctrl_c=interrupted.by_ctrl_c,
        ) from interrupted


def _row(member: _Member) -> SweepRow:
    config = member.run.config
    done, is_main = member.error is None, member.run.accelerator.is_main_process
    return SweepRow(
        name=config.name,
        settings=member.variant.settings,
        steps=member.run.step,
        loss=final_loss(config.output) if done and is_main else None,
        file=config.file if done else None,
        error=member.error,
        validation_loss=last_validation_loss(config.output) if done and is_main else None,
    )


def _finished(config: TrainConfig, members: Sequence[_Member], result: SweepResult) -> SweepResult:
    """Write the summary and the contact sheet."""
    if all(member.error for member in members):
        raise TrainingError(f"All tuners of the sweep stopped; {members[0].run.config.name}: {members[0].error}")
    accelerator = members[0].run.accelerator
    sheet: Path | None = None
    if accelerator.is_main_process:
        samples = {member.run.config.name: member.samples.folders for member in members if member.samples.folders}
        columns = {name: folders[-1] for name, folders in samples.items()}
        base = members[0].run.config.output / "samples" / "step-000000"
        if columns and starts_as_base(config) and base.is_dir():
            columns = {"base": base, **columns}
        sheet = comparison(columns, config.validation.prompts, config.output / "sweep.png")
        write_summary(result)
    accelerator.wait_for_everyone()
    return result.with_sheet(sheet)
