"""`restune data inspect`: check a data folder without training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import ValidationError

from ...data.config import DataConfig
from ...storage.base_files.check import check_base
from ...utils.errors import DataError, RestuneError, UsageError
from ...utils.settings_merge import first_refused
from ..options.early_checks import check_data
from ..options.outputs import OverwriteOption
from ..quiet import quiet_libraries

if TYPE_CHECKING:
    from PIL import Image

    from ...data.data_sheet import DataSheet


class InspectDataOptions(DataConfig, OverwriteOption):
    """Check a data folder without training: sizes, captions, and the files left out with the reason.

    The settings are those of `restune train`.

    Example: restune data inspect ./watercolors --base ./stable-diffusion-v1-5 --bucketing --sheet sheet.png
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="data")]
    """Folder of images, as for `restune train`."""
    base: str | None = None
    """Base checkpoint of the training, for its native size, bucket step and token limit; only its configs are read.
    Without it, sizes are those of Stable Diffusion 1.5 and tokens are not counted."""
    seed: int = 0
    """Seed of the training run; random crops depend on it."""
    sheet: Path | None = None
    """Contact sheet to write: cropped images of each size with their captions."""
    json_output: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print JSON in the format of a training run's `data.json`."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            # Not a ValueError, which tyro would show in a box.
            raise UsageError(f"{first_refused(error, type(self)).sentence()}.") from error

    def run(self) -> None:
        """Print the data report and write the contact sheet.

        Raises:
            DataError: if no image can be used.
        """
        check_data(self.folder)
        if self.base is not None:
            check_base(self.base)
        if self.sheet is not None:
            image_format(self.sheet)
            self.check_outputs(self.sheet)
        quiet_libraries()
        from ...data.data_sheet import DataSheet
        from ...data.inspection import inspect_data, read_frame

        frame = read_frame(self.base, self.resolution)
        sheet = DataSheet(self.folder, [])
        try:
            contact_sheet = inspect_data(self, frame, sheet, self.seed)
        except DataError:
            if sheet.refused:
                self._print(sheet)
            raise
        self._print(sheet)
        if self.sheet is not None:
            _write(contact_sheet, self.sheet)
            if not self.json_output:
                print(f"{'sheet':<12}{self.sheet}")

    def _print(self, sheet: DataSheet) -> None:
        from ...data.inspection import describe_data

        text = json.dumps(sheet.as_json(), indent=1) if self.json_output else describe_data(sheet)
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))


def _write(image: Image.Image, path: Path) -> None:
    from ...utils.atomic_write import atomic_write

    with atomic_write(path) as file:
        image.save(file, format=image_format(path))


def image_format(path: Path) -> str:
    """Return Pillow's name of the format of an image file; raise `RestuneError` if it cannot write one."""
    from PIL import Image as pillow

    name = pillow.registered_extensions().get(path.suffix.lower(), "")
    if name not in pillow.SAVE:
        raise RestuneError(
            f"{path} is not an image file (unknown extension `{path.suffix}`); write to a .png or .jpg file."
        )
    return name
