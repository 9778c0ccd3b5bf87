"""Compare what a tuner was trained to change with what the base predicts."""

from __future__ import annotations

import json
import warnings
from typing import Any

from ..storage.header import TRAINING_KEY
from ..tuners.tuner import Tuner


def warn_of_other_prediction(pipeline: Any, tuner: Tuner, name: str) -> None:
    """Warn if a tuner was trained on a base of another prediction type; the file of a training run records it."""
    recorded = tuner.metadata.get(TRAINING_KEY)
    trained = json.loads(recorded).get("prediction_type") if recorded else None
    found = getattr(getattr(pipeline, "scheduler", None), "config", {}).get("prediction_type")
    if trained and found and trained != found:
        warnings.warn(
            f"The tuner {name!r} was trained on a base with {trained}, but this base has {found}; its images will be "
            "wrong. Use the base that it was trained for, or set the scheduler's prediction_type.",
            stacklevel=3,
        )
