"""Read a Hugging Face dataset saved with `save_to_disk`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..utils.errors import DataError
from .example import Example, caption_list, check_caption
from .files import is_file
from .refusals import Refused

_DATASET, _DATASETS = "state.json", "dataset_dict.json"
_SPLIT = "train"


def is_saved_dataset(folder: Path) -> bool:
    """Return whether a folder is a saved `Dataset` or `DatasetDict`."""
    return is_file(folder / _DATASETS) or (is_file(folder / _DATASET) and is_file(folder / "dataset_info.json"))


def read_saved_dataset(
    folder: Path, refused: list[Refused], prompt: str | None, image_column: str, caption_column: str
) -> list[Example]:
    """Return the rows of a saved dataset as examples; of several splits, those of `train`.

    Images are not loaded here: each example reads its own from the dataset's files.

    Args:
        folder: folder written by `save_to_disk`.
        refused: list that receives the skipped rows.
        prompt: caption of the rows without a caption.
        image_column: column of the images.
        caption_column: column of the captions.

    Raises:
        DataError: if `datasets` is not installed, the folder cannot be read, or a column is missing.
    """
    rows = _load(folder, image_column)
    if caption_column not in rows.column_names and prompt is None:
        raise DataError(
            f"The dataset {folder} has no column {caption_column}; its columns are {', '.join(rows.column_names)}. "
            f"Set --caption-column to the column of captions, or set one prompt for all images."
        )
    captions = rows[caption_column] if caption_column in rows.column_names else [None] * len(rows)
    examples = []
    for number, caption in enumerate(captions):
        name = folder / f"row {number}"
        try:
            text = _caption(caption, prompt, caption_column)
        except DataError as error:
            refused.append(Refused(str(name), str(error)))
            continue
        content = partial(_content, rows, number, image_column)
        examples.append(Example(name, text, captions=caption_list(caption), content=content))
    return examples


def _load(folder: Path, image_column: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{folder} is a saved dataset, but the package `datasets` is not installed; "
            f"run pip install 'restune-diffusion[datasets]'."
        ) from error
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # Arrow's readers raise almost anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"The dataset {folder} cannot be read ({reason}); save it again.") from error
    if isinstance(loaded, datasets.DatasetDict):
        if _SPLIT not in loaded and len(loaded) != 1:
            raise DataError(
                f"The dataset {folder} has the splits {', '.join(loaded)} but no split {_SPLIT}; "
                f"give the folder of one split."
            )
        loaded = loaded[_SPLIT] if _SPLIT in loaded else next(iter(loaded.values()))
    if not isinstance(loaded.features.get(image_column), datasets.Image):
        raise DataError(
            f"The dataset {folder} has no image column {image_column}; its columns are "
            f"{', '.join(loaded.column_names)}. Set --image-column to the column of images."
        )
    return loaded.cast_column(image_column, datasets.Image(decode=False))


def _caption(caption: object, prompt: str | None, column: str) -> str:
    # Datasets with several captions per image store a list in each row.
    own = caption[0] if isinstance(caption, list) and caption else caption
    text = own if isinstance(own, str) and own.strip() else prompt or next(iter(caption_list(caption)), None)
    if not text:
        raise DataError(f"has no caption in {column}; set one prompt for all images")
    check_caption(text)
    return text.strip()


def _content(rows: Any, number: int, column: str) -> bytes:
    stored = rows[number][column] or {}
    content = stored.get("bytes")
    if content is not None:
        return bytes(content)
    if not stored.get("path"):
        raise DataError("has no image")
    return Path(stored["path"]).read_bytes()
