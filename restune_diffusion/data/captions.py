"""Find the images of a folder and the caption of each."""

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
    """List what a config asks to train on, with the captions as they are trained.

    Args:
        config: where the data is, and what becomes of the captions.
        refused: takes the files and rows that are left out.

    Raises:
        DataError: if there is no such folder, its metadata cannot be read, or nothing in it can be used.
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
    """List the images of a folder with their captions, in an order that does not depend on the file system.

    Where there is a `metadata.jsonl` or `metadata.csv`, its rows decide which images are used. Otherwise it is every
    image in the folder and below, each with the caption in the `.txt` beside it.

    Args:
        folder: the folder.
        prompt: caption of the images that have none of their own.

    Raises:
        DataError: if the folder has no images, an image has no caption, or the metadata has a fault.
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
    """Return the error for data of which nothing can be trained on."""
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
            # A caption that is there is accounted for, whether it can be used or not.
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
        return "has the name of no image"
    return "has not the suffix of an image"


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
        f"has no caption; write one to {sidecar.name} beside it, name it in {METADATA_FILE}, "
        f"or give one prompt for all"
    )


def _fallback(folder: Path, prompt: str | None, repeats: bool) -> Callable[[Path], str | None]:
    """Return what calls an image that has no caption: the prompt, or the name behind its folder's number."""

    def caption(path: Path) -> str | None:
        match = _repeated_folder(path, folder) if repeats and not prompt else None
        return match[2].strip() or None if match else prompt

    return caption


def _repeats(path: Path, folder: Path) -> int:
    match = _repeated_folder(path, folder)
    return max(1, int(match[1])) if match else 1


def _repeated_folder(path: Path, folder: Path) -> re.Match[str] | None:
    """Return the number and name of the nearest folder above an image that has a number, the data folder included."""
    for parent in path.parents:
        match = _REPEATED.fullmatch(parent.name)
        if match or parent == folder:
            return match
    return None


def apply_rule(caption: str, config: DataConfig) -> str:
    """Put the trigger word and the template of a config around a caption.

    Without a template the trigger word comes first, where the caption does not have it already; with one, the template
    alone decides.
    """
    trigger = config.trigger_word or ""
    if config.caption_template is not None:
        values = {"trigger": trigger, "caption": caption}
        # At once, so that braces in a caption are not read as names.
        return re.sub(r"\{(trigger|caption)\}", lambda name: values[name[1]], config.caption_template)
    if not trigger or contains_token(caption, [trigger]):
        return caption
    return f"{trigger}, {caption}" if caption else trigger
