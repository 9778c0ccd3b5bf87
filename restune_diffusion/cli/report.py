"""`restune report`: HTML page about a training run or a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from pydantic import ConfigDict

from ..utils.errors import RestuneError
from .options.outputs import OverwriteOption


class ReportOptions(OverwriteOption):
    """Write a self-contained HTML page about a training run: curves, samples over time, data, settings, usage.

    Of a sweep's folder it shows the tuners side by side. The command also works during the run.
    Example: restune report ./out
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Annotated[Path, tyro.conf.Positional]
    """Output folder of the training run or the sweep."""
    output: Path | None = None
    """Output file; report.html in the run's folder if not given."""

    def run(self) -> None:
        """Write the page and print its path."""
        if not self.folder.is_dir():
            raise RestuneError(f"There is no folder {self.folder}; give the output folder of a training run.")
        # The page in the run's own folder is written again as the run advances.
        self.check_outputs(*([] if self.output is None else [self.output]))
        from .quiet import quiet_libraries

        quiet_libraries()
        from ..training.report import write_report

        print(write_report(self.folder, self.output))
