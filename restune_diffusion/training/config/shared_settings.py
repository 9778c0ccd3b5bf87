"""Sets of settings by what they affect: training batches, tuner weights or output."""

from __future__ import annotations

from typing import Any

from .train_config import SETTINGS, TrainConfig, current_settings

_RECORDED = {info.record: info for info in SETTINGS.values() if info.record is not None}


def _names(*affects: str) -> frozenset[str]:
    return frozenset(info.name for info in _RECORDED.values() if info.affects in affects)


OF_THE_TUNER = _names("tuner")
"""Settings that change what the tuner learns from a batch, but not the batch."""
OF_THE_OUTPUT = _names("output")
"""Settings that change neither, so that a resumed run may change them."""
SWEPT = frozenset(
    info.name
    for info in SETTINGS.values()
    if info.swept or (info.affects == "tuner" and info.record is not None and info.name != "bypass")
)
"""Settings in which the tuners of a sweep may differ, in addition to those of their parts."""


def batch_settings(config: TrainConfig, *, order: bool = True) -> dict[str, Any]:
    """Return the recorded settings that may change the batches of a tuner that trains on features, as JSON values.

    Args:
        config: settings of the run.
        order: whether to include settings that only affect the grouping of samples into batches, and those that are
            compared by hash.
    """
    return _recorded_without(config, "tuner", "output", *(() if order else ("order", "content")))


def identity_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the recorded settings that determine the weights of the tuner, as plain JSON values."""
    return _recorded_without(config, "output")


def _recorded_without(config: TrainConfig, *affects: str) -> dict[str, Any]:
    left_out = {info.record for info in current_settings().values() if info.affects in affects}
    return {name: value for name, value in config.recorded().items() if name not in left_out}
