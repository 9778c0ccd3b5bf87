"""`restune report`: one page about a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict


class ReportOptions(BaseModel):
    """Write one self-contained HTML page about a training: curves, samples over time, data, settings, how to use it.

    It also works while the training is going on. Example: restune report ./out
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Annotated[Path, tyro.conf.Positional]
    """Output folder of the training."""
    output: Path | None = None
    """Where to write the page; report.html in the folder where not given."""

    def run(self) -> None:
        """Write the page and print where it is."""
        from .quiet import quiet_libraries

        quiet_libraries()
        from ..training.report import write_report

        print(write_report(self.folder, self.output))
