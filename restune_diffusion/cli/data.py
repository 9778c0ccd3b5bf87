"""`restune data inspect`: say what a folder would train on, without training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ..data.config import DataConfig
from ..utils.errors import DataError, RestuneError
from ..utils.settings import Settings
from .quiet import quiet_libraries

if TYPE_CHECKING:
    from PIL import Image

    from ..data.data_sheet import DataSheet


class _Action(Settings):
    # A base of its own, because fields of a class come after those that it inherits.
    action: Annotated[Literal["inspect"], tyro.conf.Positional]
    """What to do."""


class DataOptions(DataConfig, _Action):
    """Show what a folder would train on: sizes, captions, and what is left out and why. Nothing is trained.

    The settings are those of `restune train`.

    Example: restune data inspect ./watercolors --base ./stable-diffusion-v1-5 --bucketing --sheet sheet.png
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="data")]
    """Folder of images, as for `restune train`."""
    base: str | None = None
    """Checkpoint to train on, whose own size, steps of sizes and length of captions count; only its configs are read.
    Without it they are those of Stable Diffusion 1.5, and captions are not counted in tokens."""
    seed: int = 0
    """Seed of the training, which random crops depend on."""
    sheet: Path | None = None
    """Picture to write: some images of each size as they are cut, with their captions."""
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print JSON for other programs: what a training writes to `data.json`."""

    def run(self) -> None:
        """Print what is there.

        Raises:
            DataError: if nothing can be trained on.
        """
        quiet_libraries()
        from ..data.data_sheet import DataSheet
        from ..data.inspection import inspect_data, read_frame

        frame = read_frame(self.base, self.resolution)
        sheet = DataSheet(self.folder, [])
        try:
            picture = inspect_data(self, frame, sheet, self.seed)
        except DataError:
            if sheet.refused:
                self._print(sheet)
            raise
        self._print(sheet)
        if self.sheet is not None:
            _write(picture, self.sheet)
            if not self.json_output:
                print(f"{'sheet':<12}{self.sheet}")

    def _print(self, sheet: DataSheet) -> None:
        from ..data.inspection import describe_data

        text = json.dumps(sheet.as_json(), indent=1) if self.json_output else describe_data(sheet)
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))


def _write(picture: Image.Image, path: Path) -> None:
    from PIL import Image as pillow

    from ..utils.atomic_write import atomic_write

    kind = pillow.registered_extensions().get(path.suffix.lower())
    if kind not in pillow.SAVE:
        raise RestuneError(f"{path} is not an image file (unknown extension `{path.suffix}`); write to a .png or .jpg file.")
    with atomic_write(path) as file:
        picture.save(file, format=kind)
