"""Data sheet of a training run, read from its output folder."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ...data.data_sheet import FILE_NAME


class _Facts(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Bucket(_Facts):
    """Image size in pixels, and the number of images with it."""

    width: int
    height: int
    images: int


class Caption(_Facts):
    """Caption, and the number of images with it; `tokens` is set if it is too long for the text encoder."""

    text: str
    images: int
    tokens: int | None = None


class LeftOut(_Facts):
    """File left out of training; `fault` is false if it was left out on purpose."""

    name: str
    reason: str
    fault: bool = True


class HeldOutImage(_Facts):
    """Image held out of training, for the validation loss."""

    name: str
    caption: str = ""


class DataSheet(_Facts):
    """Number of images, captions and sizes of a run, and the files left out with their reasons."""

    images: int
    shown_per_epoch: int | None = None
    buckets: tuple[Bucket, ...] = ()
    captions: tuple[Caption, ...] = ()
    enlarged: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    held_out: tuple[HeldOutImage, ...] = ()


def read_data_sheet(folder: Path) -> DataSheet | None:
    """Return the data sheet in a run's output folder, or None if it is missing or cannot be read."""
    try:
        return DataSheet.model_validate_json((folder / FILE_NAME).read_bytes())
    except (OSError, ValidationError):
        return None
