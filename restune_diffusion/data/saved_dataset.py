"""Read a dataset that Hugging Face's `datasets` wrote with `save_to_disk`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..utils.errors import DataError
from .example import Example, check_caption
from .files import is_file
from .refusals import Refused

_DATASET, _DATASETS = "state.json", "dataset_dict.json"
_SPLIT = "train"


def is_saved_dataset(folder: Path) -> bool:
    """Say whether a folder holds a saved dataset, or several as its splits."""
    return is_file(folder / _DATASETS) or (is_file(folder / _DATASET) and is_file(folder / "dataset_info.json"))


def read_saved_dataset(
    folder: Path, refused: list[Refused], prompt: str | None, image_column: str, caption_column: str
) -> list[Example]:
    """List the rows of a saved dataset; of several splits it is `train`. The images stay in the dataset's files.

    Args:
        folder: what `save_to_disk` wrote.
        refused: takes the rows that are left out.
        prompt: caption of the rows that have none.
        image_column: the column with the images.
        caption_column: the column with the captions.

    Raises:
        DataError: if `datasets` is not installed, the folder cannot be read, or it has no such columns.
    """
    rows = _load(folder, image_column)
    if caption_column not in rows.column_names and prompt is None:
        raise DataError(
            f"The dataset {folder} has no column {caption_column}, but {', '.join(rows.column_names)}; "
            f"name the one with the captions by --caption-column, or give one prompt for all."
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
        examples.append(Example(name, text, content=partial(_content, rows, number, image_column)))
    return examples


def _load(folder: Path, image_column: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{folder} is a dataset that `datasets` saved, which is not installed; "
            f"run pip install 'restune-diffusion[datasets]'."
        ) from error
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # Arrow's readers raise almost anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"The dataset {folder} cannot be read ({reason}); save it anew.") from error
    if isinstance(loaded, datasets.DatasetDict):
        if _SPLIT not in loaded and len(loaded) != 1:
            raise DataError(
                f"The dataset {folder} has the splits {', '.join(loaded)} and no {_SPLIT}; give the folder of one."
            )
        loaded = loaded[_SPLIT] if _SPLIT in loaded else next(iter(loaded.values()))
    kind = loaded.features.get(image_column)
    if not isinstance(kind, datasets.Image):
        raise DataError(
            f"The dataset {folder} has no column {image_column} of images, but {', '.join(loaded.column_names)}; "
            f"name the one with the images by --image-column."
        )
    return loaded.cast_column(image_column, datasets.Image(decode=False))


def _caption(caption: object, prompt: str | None, column: str) -> str:
    # Datasets of several captions an image have a list in each row; the first is as good as any.
    own = caption[0] if isinstance(caption, list) and caption else caption
    text = own if isinstance(own, str) and own.strip() else prompt
    if not text:
        raise DataError(f"has no caption in {column}; give one prompt for all")
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
