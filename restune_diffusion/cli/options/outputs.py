"""Output paths of the command line: nothing that exists is replaced without `--overwrite`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel

from ...utils.errors import RestuneError
from ...utils.same_file import is_same_file
from .early_checks import check_writable


class OverwriteOption(BaseModel):
    """Option that allows existing output files to be replaced."""

    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace existing output files."""

    def check_outputs(self, *outputs: Path, inputs: Iterable[str | Path] = ()) -> None:
        """Check the output files before the work.

        Args:
            outputs: the files that a command will write.
            inputs: files that it reads.

        Raises:
            RestuneError: if an output is one of the inputs, exists and may not be replaced, or cannot be written.
        """
        read = [Path(path) for path in inputs]
        for output in outputs:
            if any(is_same_file(output, path) for path in read):
                raise RestuneError(
                    f"The output {output} is also an input, which would be lost; choose another output."
                )
            # A folder counts if there is something in it.
            if not self.overwrite and (any(output.iterdir()) if output.is_dir() else output.exists()):
                raise RestuneError(f"{output} exists; choose another output, or add --overwrite to replace it.")
            check_writable(output.parent)
