"""Options that the actions of `restune queue` share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from ...run_queue import RunQueue


class QueueOptions(BaseModel):
    """Folder of the queue."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    queue: Path | None = None
    """Folder of the queue; RESTUNE_HOME/queue or ~/restune/queue if not given."""

    def opened(self) -> RunQueue:
        """Return the queue."""
        return open_queue(self.queue)


def open_queue(folder: Path | None) -> RunQueue:
    """Return the queue in a folder, by default that of the studio."""
    # It imports the settings of training, which other commands do not need.
    from ...run_queue import RunQueue

    home = restune_home()
    return RunQueue(home / "queue" if folder is None else folder)


def restune_home() -> Path:
    """Return the folder of the studio and of the queue: RESTUNE_HOME, or ~/restune."""
    return Path(os.environ.get("RESTUNE_HOME") or Path.home() / "restune")
