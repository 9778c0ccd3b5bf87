"""`restune queue list`: a table of the runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import tyro

from ...utils.display import printable
from .options import QueueOptions

if TYPE_CHECKING:
    from ...run_queue import QueuedRun


class ListOptions(QueueOptions):
    """List the runs of the queue in their order, with errors below.

    Example: restune queue list
    """

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the runs as JSON, with paths, times and commands."""

    def run(self) -> None:
        """Print the table."""
        from ...run_queue import living_supervisor

        queue = self.opened()
        runs = queue.runs()
        if self.as_json:
            print(json.dumps([asdict(run) for run in runs], indent=2, default=str))
            return
        if not runs:
            print(f"The queue {queue.folder} is empty; `restune queue add` adds a run.")
            return
        print(table(runs))
        for run in runs:
            if run.message is not None:
                print(f"{run.id}: {run.message}")
        if living_supervisor(queue.folder) is None and any(run.state == "waiting" for run in runs):
            print("Nothing works on the queue now; `restune queue run` starts its runs.")


def table(runs: Sequence[QueuedRun]) -> str:
    """Return the runs as lines with aligned columns."""
    rows = [("run", "state", "name", "started", "ended", "output"), *map(_row, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(run: QueuedRun) -> tuple[str, ...]:
    state = "stopping" if run.stopping else run.state
    return run.id, state, run.name, _time(run.started), _time(run.ended), printable(str(run.output))


def _time(moment: datetime | None) -> str:
    return "-" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M")
