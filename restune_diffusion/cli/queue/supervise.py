"""`restune queue run`: start the runs of the queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..options.flag_check import listed
from .options import QueueOptions

if TYPE_CHECKING:
    from ...run_queue import QueuedRun


class RunOptions(QueueOptions):
    """Start the runs of the queue in their order, one for each device, and wait for further ones.

    Ctrl-C ends this command and no run. The next `restune queue run` finds running runs again, and continues those
    that a reboot or `kill -9` has interrupted.

    Example: restune queue run --devices cuda:0 cuda:1
    """

    devices: tuple[str, ...] = ("auto",)
    """Devices, each of which trains one run at a time: `auto` leaves the choice to the run, `cpu`, or GPUs such as
    `cuda:0 cuda:1`."""
    until_empty: bool = False
    """End when no run is waiting or running."""
    background: bool = False
    """Start a process in the background, and return. It ends after a minute without a waiting or running run."""

    def run(self) -> None:
        """Supervise the queue."""
        from ...run_queue import Supervisor, ensure_supervisor

        queue = self.opened()
        if self.background:
            process = ensure_supervisor(queue.folder, self.devices)
            print(f"Process {process} works on the queue {queue.folder}.")
            return
        supervisor = Supervisor(queue, self.devices, _show)
        print(f"Working on the queue {queue.folder}; Ctrl-C ends this command and no run.", flush=True)
        supervisor.run(until_empty=self.until_empty)
        running = [run.id for run in queue.runs() if run.state == "running"]
        if running:
            goes = f"Run {running[0]} goes" if len(running) == 1 else f"Runs {listed(running)} go"
            print(f"{goes} on; `restune queue cancel` stops a run.")


def _show(run: QueuedRun) -> None:
    message = "" if run.message is None else f": {run.message}"
    print(f"Run {run.id} ({run.name}): {run.state}{message}", flush=True)
