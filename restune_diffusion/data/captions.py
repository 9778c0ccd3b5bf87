"""Find the images of a folder and their captions."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from ..hooks.placeholder_tokens import contains_token
from ..utils.display import counted
from ..utils.errors import DataError
from ..utils.seeds import derived_seed
from .caption_variants.variants import caption_lines, caption_variants
from .config import DataConfig
from .conventions.caption_files import CaptionFiles, is_caption_file
from .conventions.image_suffixes import missing_reader
from .conventions.label_files import MASK_LABEL, label_of, why_not_trained_on
from .example import Example, check_caption
from .files import is_image, list_files, read_text
from .metadata import METADATA_FILE, find_metadata, read_metadata
from .refusals import Refused
from .saved_dataset import is_saved_dataset, read_saved_dataset

logger = logging.getLogger(__name__)

_REPEATED = re.compile(r"(\d{1,6})_(.*)")


def read_examples(
    config: DataConfig, refused: list[Refused], seed: int = 0, placeholder_tokens: Sequence[str] = ()
) -> list[Example]:
    """Return the training examples of a config, with the trigger word and template applied to their captions.

    Args:
        config: settings of the data folder and the captions.
        refused: list that receives the skipped files and rows.
        seed: seed of the run, for the variants of captions.
        placeholder_tokens: placeholder tokens that are trained; tags that contain one are kept.

    Raises:
        DataError: if the folder does not exist, its metadata cannot be read, or it has no usable image.
    """
    folder = config.folder
    if is_saved_dataset(folder):
        examples = read_saved_dataset(folder, refused, config.prompt, config.image_column, config.caption_column)
    else:
        examples = _scan(config, refused)
    if config.has_variants:
        examples = list(_with_variants(examples, config, refused, seed, placeholder_tokens))
    else:
        _note_unread(examples, config, refused)
        examples = [replace(example, caption=apply_rule(example.caption, config)) for example in examples]
    if not examples:
        raise nothing_usable(folder, refused)
    return examples


def _note_unread(examples: Sequence[Example], config: DataConfig, refused: list[Refused]) -> None:
    several = sum(len(example.captions) > 1 for example in examples)
    if several:
        reason = f"has {counted(several, 'image')} with a list of captions, of which the first is read"
        refused.append(Refused(str(config.folder), f"{reason}; set --captions all to use each of them", fault=False))


def _with_variants(
    examples: Sequence[Example], config: DataConfig, refused: list[Refused], seed: int, tokens: Sequence[str]
) -> Iterator[Example]:
    """Yield the examples with the variants of their captions, with the trigger word and the template."""
    words = [*([config.trigger_word] if config.trigger_word else []), *tokens]
    for example in examples:
        captions = [example.caption]
        if config.captions == "all":
            captions = caption_lines(example.captions or captions)
        try:
            for caption in captions:
                check_caption(caption)
        except DataError as error:
            refused.append(Refused(str(example.path), str(error)))
            continue
        # By the image's name, so that other images of the folder do not change its variants.
        inside = example.path.is_relative_to(config.folder)
        name = example.path.relative_to(config.folder).as_posix() if inside else example.path.name
        found = caption_variants(captions, config, Random(derived_seed(seed, f"captions of {name}")), words)
        texts = tuple(apply_rule(text, config) for text in found.texts)
        yield replace(example, caption=texts[0], variants=replace(found, texts=texts))


def find_examples(folder: Path, prompt: str | None = None) -> list[Example]:
    """Return the images of a folder with their captions, sorted independently of the file system.

    The rows of `metadata.jsonl` or `metadata.csv`, in the folder or in its subfolder `train`, select the images if one
    of these files exists. Otherwise every image in the folder and its subfolders is used, with the caption from the
    `.txt` or `.caption` file of the same name.

    Args:
        folder: folder of images.
        prompt: caption of the images without a caption of their own.

    Raises:
        DataError: if the folder has no images, an image has no caption, or the metadata is invalid.
    """
    refused: list[Refused] = []
    examples = _scan(DataConfig(folder=folder, prompt=prompt), refused)
    faults = [each for each in refused if each.fault]
    if faults:
        raise DataError(str(faults[0]))
    if not examples:
        raise nothing_usable(folder, refused)
    unused = [each for each in refused if is_image(Path(each.name))]
    if unused:
        logger.warning("Not used in %s: %s, first %s", folder, counted(len(unused), "image"), unused[0])
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


def _scan(config: DataConfig, refused: list[Refused]) -> list[Example]:
    folder = config.folder
    if not folder.is_dir():
        raise DataError(f"The image folder {folder} does not exist; give the path of a folder of images.")
    files = list_files(folder, refused)
    images = [path for path in files if is_image(path) and label_of(path) is None]
    metadata = find_metadata(folder, files)
    fallback = _fallback(folder, config.prompt, config.folder_repeats)
    used: set[Path] = set()
    if metadata is not None:
        examples = read_metadata(metadata, fallback, refused, config.caption_column)
        used |= {metadata, *(path for example in examples for path in (example.path, *example.conditions.values()))}
    else:
        examples = []
        captions = CaptionFiles(files)
        for path in images:
            sidecar = captions.of(path)
            # An existing caption file counts as used even if its image is refused.
            used |= {path} if sidecar is None else {path, sidecar}
            try:
                examples.append(Example(path, _sidecar_caption(path, sidecar, fallback)))
            except DataError as error:
                refused.append(Refused(str(path), str(error)))
    if config.masked_loss == "files" and config.mask_data is None:
        used |= {path for path in files if label_of(path) == MASK_LABEL}
    resolved = {os.path.realpath(path) for path in used}
    stems = {path.with_suffix("") for path in images}
    refused += [_unused(path, metadata, folder, stems) for path in files if os.path.realpath(path) not in resolved]
    if config.folder_repeats:
        return [replace(each, repeats=_repeats(each.path, folder)) for each in examples]
    return examples


def _unused(path: Path, metadata: Path | None, folder: Path, stems: set[Path]) -> Refused:
    """Return why a file is not used; an image that only lacks a reader counts as a fault."""
    label, unreadable = label_of(path), missing_reader(path.suffix)
    if label is not None:
        return Refused(str(path), why_not_trained_on(label), fault=False)
    if metadata is not None:
        return Refused(str(path), f"has no usable row in {metadata.relative_to(folder)}", fault=False)
    if unreadable is not None:
        return Refused(str(path), unreadable)
    return Refused(str(path), _why_unused(path, stems), fault=False)


def _why_unused(path: Path, stems: set[Path]) -> str:
    if is_caption_file(path):
        if path.with_suffix("") in stems:
            return "is a second caption file of an image, and only the first is read"
        return "is a caption file without an image of the same name"
    if not path.suffix:
        return "is not an image file"
    reason = f"is not an image file (unknown extension `{path.suffix}`)"
    return reason + ", and captions are read from .txt and .caption files" if path.with_suffix("") in stems else reason


def _sidecar_caption(path: Path, sidecar: Path | None, fallback: Callable[[Path], str | None]) -> str:
    try:
        own = read_text(sidecar).strip() if sidecar is not None else ""
    except DataError as error:
        raise DataError(f"has a caption that cannot be read: {str(error).rstrip('.')}") from error
    check_caption(own)
    caption = own or fallback(path)
    if caption:
        return caption
    raise DataError(
        f"has no caption; write one to {(sidecar or path.with_suffix('.txt')).name} in the same folder, name it in "
        f"{METADATA_FILE}, or set one prompt for all images"
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
