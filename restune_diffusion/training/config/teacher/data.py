"""Fit of a teacher's settings with those of the data: images, or prompts to generate latents from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....data.config import DataConfig

NO_DATA = Path("<none>")
"""Data folder of a run without images."""
_OF_PROMPTS = ("folder", "trigger_word", "caption_template", "resolution")


def with_generated_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat settings, with `NO_DATA` as the data folder of a run that learns from a teacher without images.

    Raises:
        ValueError: if a teacher has neither images nor prompts, or both.
    """
    result = dict(settings)
    if not result.get("teacher"):
        return result
    prompts = bool(result.get("teacher_prompts") or result.get("prompts_file"))
    given = result.get("data") is not None and Path(result["data"]) != NO_DATA
    if not prompts and not given:
        raise ValueError(
            "a teacher needs prompts or images; give --teacher-prompts or --prompts-file to train without images, or "
            "--data"
        )
    if prompts and given:
        raise ValueError(
            "data and prompts of the teacher are both given; the latents come from one of them: leave data out to "
            "train without images, or the prompts to train on the images"
        )
    return result if given else {**result, "data": NO_DATA}


def check_data_settings(data: DataConfig) -> None:
    """Raise `ValueError` if a setting of images is given for a run without images."""
    default = type(data).model_construct()
    for name in type(data).model_fields:
        if name not in _OF_PROMPTS and getattr(data, name) != getattr(default, name):
            raise ValueError(
                f"{name} is a setting of images, but the latents are generated from prompts; "
                f"leave {name} out, or give --data instead of prompts"
            )
