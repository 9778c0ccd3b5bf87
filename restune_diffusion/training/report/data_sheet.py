"""What a run was trained on, as it wrote it down."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ...data.data_sheet import FILE_NAME


class _Facts(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Bucket(_Facts):
    """A size of images, in pixels, and how many have it."""

    width: int
    height: int
    images: int


class Caption(_Facts):
    """A caption, and how many images have it; `tokens` where these are too many for the text encoder."""

    text: str
    images: int
    tokens: int | None = None


class LeftOut(_Facts):
    """A file that is not trained on; `fault` is false where it is not meant to be."""

    name: str
    reason: str
    fault: bool = True


class DataSheet(_Facts):
    """Counts of a run's data, its captions, and what was left out and why."""

    images: int
    shown_per_epoch: int | None = None
    buckets: tuple[Bucket, ...] = ()
    captions: tuple[Caption, ...] = ()
    enlarged: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    left_out: tuple[LeftOut, ...] = ()


def read_data_sheet(folder: Path) -> DataSheet | None:
    """Read the sheet that a run wrote into its output folder; None where there is none that can be read."""
    try:
        return DataSheet.model_validate_json((folder / FILE_NAME).read_bytes())
    except (OSError, ValidationError):
        return None
