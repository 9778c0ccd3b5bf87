"""Warnings about a run that will probably go wrong, for the plan that is shown before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from ..config.validation import logged_name
from ..state import TrainState
from .data import data_warnings
from .length import length_warnings
from .outline import RunOutline
from .rates import rate_warnings

logger = logging.getLogger(__name__)


def warnings_of(run: TrainState) -> Iterator[str]:
    """Yield a sentence with cause and remedy for each thing that will probably go wrong."""
    return warnings_about(RunOutline.of(run))


def warnings_about(run: RunOutline) -> Iterator[str]:
    """Yield the warnings for the outline of a run."""
    yield from length_warnings(run)
    yield from rate_warnings(run)
    yield from data_warnings(run)


def log_warnings(run: TrainState) -> None:
    """Log the warnings and the metrics that cannot be measured, for runs that print no plan."""
    if run.accelerator.is_main_process:
        for warning in warnings_of(run):
            logger.warning("%s", warning)
        for name, reason in run.metrics.missing.items() if run.metrics is not None else ():
            logger.warning("%s is not measured: it %s.", logged_name(name), reason)
