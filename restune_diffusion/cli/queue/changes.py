"""`restune queue cancel`, `resume`, `move` and `remove`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

import tyro

from ...utils.errors import UsageError
from .options import QueueOptions


class _SeveralOptions(QueueOptions):
    """Numbers of runs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Numbers of the runs, as `restune queue list` shows them."""

    def for_each(self, change: Callable[[str], None], done: str) -> None:
        """Apply a change to each run and print it.

        Args:
            change: function that takes the number of a run.
            done: what has happened to the run.
        """
        for run in self.runs:
            change(run)
            print(f"Run {run} {done}.")


class CancelOptions(_SeveralOptions):
    """Cancel waiting runs, and stop running ones after their step, with a checkpoint.

    Example: restune queue cancel 3 4
    """

    now: bool = False
    """Kill the processes of running runs at once, without a checkpoint."""

    def run(self) -> None:
        """Cancel the runs."""
        queue = self.opened()
        for run in self.runs:
            queue.cancel(run, now=self.now)
            stopping = queue.get(run).stopping
            print(f"Run {run} is asked to stop." if stopping else f"Run {run} is {queue.get(run).state}.")


class ResumeOptions(_SeveralOptions):
    """Let stopped, failed or cancelled runs wait again; they continue from their newest checkpoint.

    Example: restune queue resume 3
    """

    def run(self) -> None:
        """Resume the runs."""
        self.for_each(self.opened().resume, "waits")


class RemoveOptions(_SeveralOptions):
    """Remove runs from the queue, with their logs; their output folders stay.

    Example: restune queue remove 1 2
    """

    def run(self) -> None:
        """Remove the runs."""
        self.for_each(self.opened().remove, "is removed")


class MoveOptions(QueueOptions):
    """Move a run to another place; waiting runs start in the order of the list.

    Example: restune queue move 5 1
    """

    number: Annotated[str, tyro.conf.Positional]
    """Number of the run, as `restune queue list` shows it."""
    place: Annotated[str, tyro.conf.Positional]
    """Its new place in the list, counted from 1."""

    def run(self) -> None:
        """Move the run."""
        if not re.fullmatch(r"0*[1-9][0-9]{0,8}", self.place):
            raise UsageError(f"PLACE {self.place} is not valid; use a whole number above 0.")
        self.opened().move(self.number, int(self.place) - 1)
        print(f"Run {self.number} is moved.")
