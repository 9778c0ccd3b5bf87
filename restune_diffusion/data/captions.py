"""Find the images of a folder and their captions."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..hooks.placeholder_tokens import contains_token
from ..utils.errors import DataError
from .config import DataConfig
from .example import Example, check_caption
from .files import IMAGE_SUFFIXES, is_file, list_files, read_text
from .metadata import METADATA_CSV, METADATA_FILE, read_metadata
from .refusals import Refused
from .saved_dataset import is_saved_dataset, read_saved_dataset

logger = logging.getLogger(__name__)

_REPEATED = re.compile(r"(\d{1,6})_(.*)")


def read_examples(config: DataConfig, refused: list[Refused]) -> list[Example]:
    """Return the training examples of a config, with the trigger word and template applied to their captions.

    Args:
        config: settings of the data folder and the captions.
        refused: list that receives the skipped files and rows.

    Raises:
        DataError: if the folder does not exist, its metadata cannot be read, or it has no usable image.
    """
    folder = config.folder
    if is_saved_dataset(folder):
        examples = read_saved_dataset(folder, refused, config.prompt, config.image_column, config.caption_column)
    else:
        examples = _scan(folder, refused, config.prompt, config.caption_column, config.folder_repeats)
    if not examples:
        raise nothing_usable(folder, refused)
    return [replace(example, caption=apply_rule(example.caption, config)) for example in examples]


def find_examples(folder: Path, prompt: str | None = None) -> list[Example]:
    """Return the images of a folder with their captions, sorted independently of the file system.

    The rows of `metadata.jsonl` or `metadata.csv` select the images if one of these files exists. Otherwise every
    image in the folder and its subfolders is used, with the caption from the `.txt` file of the same name.

    Args:
        folder: folder of images.
        prompt: caption of the images without a caption of their own.

    Raises:
        DataError: if the folder has no images, an image has no caption, or the metadata is invalid.
    """
    refused: list[Refused] = []
    examples = _scan(folder, refused, prompt)
    faults = [each for each in refused if each.fault]
    if faults:
        raise DataError(str(faults[0]))
    if not examples:
        raise nothing_usable(folder, refused)
    unused = [each for each in refused if Path(each.name).suffix.lower() in IMAGE_SUFFIXES]
    if unused:
        logger.warning("%d images in %s are not used: %s", len(unused), folder, unused[0])
    return examples


def nothing_usable(folder: Path, refused: list[Refused]) -> DataError:
    """Return the error for a data folder without a usable image."""
    faults = [each for each in refused if each.fault]
    if not faults:
        return DataError(f"The image folder {folder} has no images; put some PNG, JPEG or WebP files there.")
    rest = (
        f" {len(faults) - 1} more are left out too; `restune data inspect` lists them all." if len(faults) > 1 else ""
    )
    return DataError(f"None of the images in {folder} can be used: {faults[0]}{rest}")


def _scan(
    folder: Path, refused: list[Refused], prompt: str | None, caption_column: str = "text", repeats: bool = False
) -> list[Example]:
    if not folder.is_dir():
        raise DataError(f"The image folder {folder} does not exist; give the path of a folder of images.")
    files = list_files(folder, refused)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    metadata = [path for path in (folder / METADATA_FILE, folder / METADATA_CSV) if is_file(path)]
    fallback = _fallback(folder, prompt, repeats)
    used: set[Path] = set(metadata[:1])
    if metadata:
        examples = read_metadata(metadata[0], fallback, refused, caption_column)
        used |= {path for example in examples for path in (example.path, *example.conditions.values())}
    else:
        examples = []
        for path in images:
            sidecar = path.with_suffix(".txt")
            # An existing caption file counts as used even if its image is refused.
            used |= {path, sidecar}
            try:
                examples.append(Example(path, _sidecar_caption(path, sidecar, fallback)))
            except DataError as error:
                refused.append(Refused(str(path), str(error)))
    refused += [Refused(str(path), _why_unused(path, metadata), fault=False) for path in files if path not in used]
    return [replace(each, repeats=_repeats(each.path, folder)) for each in examples] if repeats else examples


def _why_unused(path: Path, metadata: list[Path]) -> str:
    if metadata:
        return f"is not named in {metadata[0].name}"
    if path.suffix.lower() == ".txt":
        return "is a caption file without an image of the same name"
    return f"is not an image file (unknown extension `{path.suffix}`)" if path.suffix else "is not an image file"


def _sidecar_caption(path: Path, sidecar: Path, fallback: Callable[[Path], str | None]) -> str:
    try:
        own = read_text(sidecar).strip() if is_file(sidecar) else ""
    except DataError as error:
        raise DataError(f"has a caption that cannot be read: {str(error).rstrip('.')}") from error
    check_caption(own)
    caption = own or fallback(path)
    if caption:
        return caption
    raise DataError(
        f"has no caption; write one to {sidecar.name} in the same folder, name it in {METADATA_FILE}, "
        f"or set one prompt for all images"
    )


def _fallback(folder: Path, prompt: str | None, repeats: bool) -> Callable[[Path], str | None]:
    """Return a function from an image's path to its default caption: the prompt, or `cat` for a folder `10_cat`."""

    def caption(path: Path) -> str | None:
        match = _repeated_folder(path, folder) if repeats and not prompt else None
        return match[2].strip() or None if match else prompt

    return caption


def _repeats(path: Path, folder: Path) -> int:
    match = _repeated_folder(path, folder)
    return max(1, int(match[1])) if match else 1


def _repeated_folder(path: Path, folder: Path) -> re.Match[str] | None:
    """Return the number and name of the nearest numbered parent folder of an image, up to the data folder."""
    for parent in path.parents:
        match = _REPEATED.fullmatch(parent.name)
        if match or parent == folder:
            return match
    return None


def apply_rule(caption: str, config: DataConfig) -> str:
    """Apply the trigger word and the caption template of a config to a caption.

    With a template, the caption is inserted into the template. Without one, the trigger word is prepended unless the
    caption already contains it.
    """
    trigger = config.trigger_word or ""
    if config.caption_template is not None:
        values = {"trigger": trigger, "caption": caption}
        # One substitution for both names: braces inside a caption must not be replaced.
        return re.sub(r"\{(trigger|caption)\}", lambda name: values[name[1]], config.caption_template)
    if not trigger or contains_token(caption, [trigger]):
        return caption
    return f"{trigger}, {caption}" if caption else trigger
