"""Find or compute the condition images of a training image, one for each condition of a control tuner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from ..imaging.conditions import MAKERS, condition_to_tensor, make_condition
from ..imaging.image_files import read_layer
from ..tuners.registry import ConditionedConfig
from ..utils.errors import DataError
from .conventions.partner_files import PartnerFiles
from .example import Example
from .image_files import Crop, centred, same_shape
from .metadata import METADATA_FILE


class ConditionSource:
    """Source of the condition images of a training run, chosen separately for each condition.

    Files take precedence: those named in `metadata.jsonl`, or those in a folder. A condition without files is computed
    from the training image if its name is in `restune_diffusion.imaging.conditions.MAKERS`.

    Args:
        config: settings of the control part.
        folder: folder of condition images with the file names of the training images; extensions may differ. For
            several conditions it contains one subfolder for each, named after the condition.

    Raises:
        DataError: if a folder does not exist.
    """

    def __init__(self, config: ConditionedConfig, folder: Path | None = None) -> None:
        self.names = config.conditions
        self.channels = config.channels
        self._folders = {} if folder is None else self._find_folders(folder)
        self._made: set[str] = set()

    def describe(self) -> str:
        """Describe the source of each condition in one line."""
        return ", ".join(
            f"{name} ({'made from the images' if name in self._made else 'from files'})" for name in self.names
        )

    def paired(self, examples: Sequence[Example], root: Path) -> list[Example]:
        """Return the examples with their condition files; a condition without files is computed from the image.

        Args:
            examples: the training images.
            root: folder of the training images.

        Raises:
            DataError: if an image lacks a condition that others have, a condition can be neither found nor computed,
                or a folder of condition images is inside the folder of training images.
        """
        for folder in self._folders.values():
            if folder.resolve().is_relative_to(root.resolve()):
                raise DataError(f"{folder} lies inside the image folder; move the condition images out of it.")
        files = {name: self._find_files(number, name, examples, root) for number, name in enumerate(self.names)}
        self._made = {name for name, found in files.items() if not found}
        return [
            replace(example, conditions={name: found[place] for name, found in files.items() if found})
            for place, example in enumerate(examples)
        ]

    def tensors(self, example: Example, layer: Image.Image, crop: Crop) -> tuple[torch.Tensor, ...]:
        """Return the condition images of an example, uint8, each `(channels, height, width)`.

        Args:
            example: a paired example.
            layer: its image, RGB or RGBA.
            crop: crop of the image; applied to the condition images too.

        Raises:
            DataError: if a condition file cannot be read, or its aspect ratio differs from the image's.
        """
        return tuple(
            condition_to_tensor(self._image(name, example, layer, crop), self.channels) for name in self.names
        )

    def samples(self, paths: Sequence[Path], resolution: int) -> list[dict[str, Image.Image]]:
        """Return the condition images of the validation prompts, keyed by name.

        Args:
            paths: one file for each prompt and condition, the conditions of a prompt next to each other.
            resolution: side of the square that each file is scaled and cropped to, in pixels.

        Raises:
            DataError: if a file cannot be read.
        """
        images = [_read(path) for path in paths]
        squares = [centred(image.size, (resolution, resolution)).apply(image) for image in images]
        named = [
            make_condition(name, square) if name in self._made else square
            for name, square in zip(self.names * (len(paths) // len(self.names)), squares, strict=True)
        ]
        count = len(self.names)
        return [
            dict(zip(self.names, named[start : start + count], strict=True)) for start in range(0, len(named), count)
        ]

    def _image(self, name: str, example: Example, layer: Image.Image, crop: Crop) -> Image.Image:
        path = example.conditions.get(name)
        if path is None:
            return make_condition(name, crop.apply(layer))
        condition = _read(path)
        if not same_shape(condition.size, layer.size):
            raise DataError(
                f"The condition {path} has {condition.width} x {condition.height} pixels, its image "
                f"{layer.width} x {layer.height}; give both the same shape."
            )
        return crop.apply(condition)

    def _find_folders(self, folder: Path) -> dict[str, Path]:
        folders = {name: folder if len(self.names) == 1 else folder / name for name in self.names}
        for path in folders.values():
            if not path.is_dir():
                raise DataError(f"The folder of condition images {path} does not exist.")
        return folders

    def _find_files(self, number: int, name: str, examples: Sequence[Example], root: Path) -> list[Path]:
        """Return the condition file of every example; an empty list if the condition is computed from the image."""
        if name in self._folders:
            found = self._in_folder(self._folders[name], examples, root)
            place = str(self._folders[name])
        else:
            found = [example.conditions.get(name, example.conditions.get(number)) for example in examples]
            place = METADATA_FILE
        if name in MAKERS and not any(found):
            return []
        files = [path for path in found if path is not None]
        if not files:
            raise DataError(
                f'There are no images for the condition {name!r}: name them in {METADATA_FILE} under "condition", '
                f"or give a folder of them, or use a condition that is computed from the image ({', '.join(MAKERS)})."
            )
        if len(files) < len(found):
            missing = examples[found.index(None)].path
            raise DataError(f"The image {missing} has no condition {name!r} in {place}, but others have.")
        return files

    def _in_folder(self, folder: Path, examples: Sequence[Example], root: Path) -> list[Path | None]:
        partners = PartnerFiles(folder, root)
        return [_partner(partners, example.path) for example in examples]


def _partner(partners: PartnerFiles, image: Path) -> Path | None:
    try:
        return partners.of(image)
    except DataError as error:
        raise DataError(f"The condition of the image {image} is ambiguous: the image {error}.") from error


def _read(path: Path) -> Image.Image:
    try:
        return read_layer(path)[0]
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        raise DataError(f"The condition {path} cannot be read as an image ({error}).") from error
