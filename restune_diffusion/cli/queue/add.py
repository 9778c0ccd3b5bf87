"""`restune queue add`: the command line of `restune train`, for later."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...utils.display import counted
from ...utils.errors import UsageError
from ..train import parse_train_options
from .options import open_queue

if TYPE_CHECKING:
    from ...training import TrainConfig


@dataclass(frozen=True)
class AddOptions:
    """Settings of a run, and the queue that it is added to."""

    config: TrainConfig
    queue: Path | None
    name: str | None

    def run(self) -> None:
        """Add the run and print its number."""
        from ...run_queue import living_supervisor

        queue = open_queue(self.queue)
        added = queue.add_config(self.config, name=self.name)
        runs = queue.runs()
        before = sum(run.state in ("waiting", "running") for run in runs[: [run.id for run in runs].index(added.id)])
        print(f"Added run {added.id} ({added.name}); {counted(before, 'run')} before it.")
        if living_supervisor(queue.folder) is None:
            print("Nothing works on the queue now; `restune queue run` starts its runs.")


def parse_add_options(description: str, args: Sequence[str]) -> AddOptions:
    """Parse the command line; invalid flags exit the process.

    Args:
        description: text of `--help` before the flags.
        args: the arguments after `restune queue add`.

    Raises:
        UsageError: if a flag of the queue lacks its value.
        SettingsError: if the file of `--config` cannot be read, or a setting in it is invalid.
    """
    own = ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--queue", type=Path, nargs="?", const=Path())
    own.add_argument("--queue-name", nargs="?", const="")
    found, rest = own.parse_known_args(list(args))
    for flag, missing in (("--queue", found.queue == Path()), ("--queue-name", found.queue_name == "")):
        if missing:
            raise UsageError(f"{flag} needs a value; leave it out for the default.")
    options = parse_train_options(description, rest, prog="restune queue add")
    return AddOptions(options.settings(), found.queue, found.queue_name)
