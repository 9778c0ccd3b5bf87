"""The files of a folder whose captions can be edited."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...utils.errors import DataError
from ..conventions.label_files import label_of
from ..files import is_image, list_files
from ..metadata import find_metadata
from ..refusals import Refused
from ..saved_dataset import is_saved_dataset


@dataclass(frozen=True)
class EditableFolder:
    """Files of a folder whose captions stand beside the images or in `metadata.jsonl`.

    Attributes:
        files: all files of the folder.
        metadata: the file `metadata.jsonl`, or None for caption files beside the images.
        refused: files that cannot be used, with the reason.
    """

    files: list[Path]
    metadata: Path | None
    refused: list[Refused]

    @property
    def images(self) -> list[Path]:
        """The images that can have a caption file."""
        return [path for path in self.files if is_image(path) and label_of(path) is None]


def editable_folder(folder: Path) -> EditableFolder:
    """Return the files of a folder.

    Raises:
        DataError: if the folder does not exist, or has its captions in a place that cannot be edited.
    """
    if not folder.is_dir():
        raise DataError(f"The image folder {folder} does not exist; give the path of a folder of images.")
    if is_saved_dataset(folder):
        raise DataError(f"{folder} is a saved dataset; change its captions with the library `datasets` (`map`).")
    refused: list[Refused] = []
    files = list_files(folder, refused)
    metadata = find_metadata(folder, files)
    if metadata is not None and metadata.suffix.lower() == ".csv":
        raise DataError(
            f"The captions are in {metadata.name}; change them in a program for tables, or save the table as "
            "metadata.jsonl."
        )
    return EditableFolder(files, metadata, refused)
