"""Train several tuners on one base and one set of encoded images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...utils.errors import TrainingError, TrainingInterrupted
from ..build import build_accelerator, build_training_state
from ..callbacks.base import Callback
from ..callbacks.reporting import Progress, describe_plan
from ..callbacks.tracking import start_trackers
from ..callbacks.validation import ValidationSamples
from ..config.shared_settings import batch_settings
from ..config.train_config import TrainConfig
from ..feature_cache.shared_pass import share_passes
from ..feature_cache.use import use_feature_cache
from ..inputs import TrainingInputs, prepared
from ..loop import steps_of
from ..state import StepReport, TrainState
from ..stopping import StopRequest
from ..trainer import acting, check_output, run_callbacks
from .grid import Variant, parse_sweep
from .report import SweepResult, SweepRow, comparison, final_loss, write_summary


@dataclass(eq=False)
class _Member:
    """One tuner of a sweep: a run like any other, and what becomes of it."""

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
    """Train a tuner for each combination of settings in `config.sweep`; each equals the one that is trained alone.

    Every tuner is a run with a folder of its own, with its checkpoints and metrics. Bypass tuners that train on the
    same batches share each pass of the base, all others are trained one after another. A tuner that diverges is left
    where it is, and the others go on.

    Args:
        config: all settings.
        pipeline: a loaded text-to-image pipeline to train on, as `train` takes it.
        on_progress: called after every step of each tuner, with the tuner's name.
        verbose: whether to print the plan and a progress bar.
        stop_on_signal: whether SIGTERM and the first Ctrl-C end the training after the step, with checkpoints.

    Returns:
        A row for each tuner; they are written to OUTPUT/sweep.json too.

    Raises:
        TrainingError: if the sweep cannot be read or started, or every tuner of it diverged.
        TrainingInterrupted: if it was stopped by a signal.
        DataError: if the images or captions cannot be used.
        TunerFileError: if a file cannot be written.
    """
    started = time.perf_counter()
    variants = parse_sweep(config)
    for variant in variants:
        check_output(variant.config)
    accelerators = [build_accelerator(variant.config) for variant in variants]
    with prepared(config, accelerators[0], pipeline, verbose=verbose) as inputs, ExitStack() as stack:
        for accelerator in accelerators:
            stack.callback(accelerator.end_training)
        members = [
            _Member(
                variant,
                build_training_state(variant.config, accelerator, inputs),
                ValidationSamples(inputs.control_images),
            )
            for variant, accelerator in zip(variants, accelerators, strict=True)
        ]
        groups = _grouped(members)
        if verbose:
            accelerators[0].print(_plan(members, groups))
        left = sum(member.run.config.steps - member.run.step for member in members)
        shown = verbose and accelerators[0].is_main_process
        bar = stack.enter_context(tqdm(total=left, unit="step", desc=config.name, disable=not shown))
        for member in members:
            name = member.run.config.name
            watching = [Progress(partial(on_progress, name))] if on_progress is not None else []
            member.callbacks = [
                *run_callbacks(inputs, member.samples, [Progress(partial(_advance, bar, name))]),
                *watching,
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


def _grouped(members: Sequence[_Member]) -> list[list[_Member]]:
    """Put those together that can share every pass of the base."""
    groups: dict[str, list[_Member]] = {}
    for number, member in enumerate(members):
        config = member.run.config
        alone = f"#{number}"
        # What preserves a class asks the base with the tuner at other prompts, in passes of its own.
        together = config.learns_from_features and config.preservation.method == "none"
        key = json.dumps(batch_settings(config)) if together else alone
        groups.setdefault(key, []).append(member)
    return list(groups.values())


def _plan(members: Sequence[_Member], groups: Sequence[Sequence[_Member]]) -> str:
    sharing = [len(group) for group in groups if len(group) > 1]
    together = f", passes of the base are shared by {' and '.join(map(str, sharing))} of them" if sharing else ""
    lines = [f"sweep       {len(members)} tuners{together}; the first of them:", describe_plan(members[0].run)]
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
    """Train the tuners step by step in turn; after a break those that are behind catch up first.

    Raises:
        TrainingInterrupted: if `stop` asked to; every one has saved its state then.
    """
    courses = {member: steps_of(member.run, member.callbacks, stop) for member in group}
    interrupted: TrainingInterrupted | None = None
    try:
        while courses:
            member = min(courses, key=lambda each: each.run.step)
            try:
                if next(courses[member], None) is None:
                    del courses[member]
            except TrainingInterrupted as stopped:
                interrupted = stopped
                del courses[member]
            except TrainingError as error:
                member.error = str(error)
                del courses[member]
    finally:
        for course in courses.values():
            course.close()
    if interrupted is not None:
        output = group[0].run.config.output.parent
        raise TrainingInterrupted(
            f"Stopped, as asked; the state of every tuner that had begun is saved in {output}: "
            f"the same command with --resume goes on from there."
        ) from interrupted


def _row(member: _Member) -> SweepRow:
    config = member.run.config
    done, knows = member.error is None, member.run.accelerator.is_main_process
    return SweepRow(
        name=config.name,
        settings=member.variant.settings,
        steps=member.run.step,
        loss=final_loss(config.output) if done and knows else None,
        file=config.file if done else None,
        error=member.error,
    )


def _finished(config: TrainConfig, members: Sequence[_Member], result: SweepResult) -> SweepResult:
    """Write the summary and the pictures side by side."""
    if all(member.error for member in members):
        raise TrainingError(f"Every tuner of the sweep stopped; {members[0].run.config.name}: {members[0].error}")
    accelerator = members[0].run.accelerator
    sheet: Path | None = None
    if accelerator.is_main_process:
        drawn = {member.run.config.name: member.samples.folders for member in members if member.samples.folders}
        sheet = comparison(drawn, config.validation.prompts, config.output / "sweep.png")
        write_summary(result)
    accelerator.wait_for_everyone()
    return result.with_sheet(sheet)
