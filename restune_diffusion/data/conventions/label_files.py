"""Masks and condition images beside images, as OneTrainer names them: `NAME-masklabel.png`, `NAME-condlabel.png`."""

from __future__ import annotations

from pathlib import Path

MASK_LABEL = "-masklabel"
_CONDITION_LABEL = "-condlabel"


def label_of(path: Path) -> str | None:
    """Return the label of a file that belongs to an image beside it; None for all other files."""
    return next((label for label in (MASK_LABEL, _CONDITION_LABEL) if path.stem.endswith(label)), None)


def why_not_trained_on(label: str) -> str:
    """Return why a labeled file is not an image, continuing a sentence that starts with its name."""
    if label == MASK_LABEL:
        return "is the mask of an image; set --masked-loss files to use it"
    return "is the condition image of an image; give condition images with --control-data"
