"""`restune queue`: choose between its actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import tyro
from pydantic import BaseModel

from ...utils.errors import UsageError
from ..options.flag_check import check_flags
from .changes import CancelOptions, MoveOptions, RemoveOptions, ResumeOptions
from .listing import ListOptions
from .supervise import RunOptions

QUEUE_HELP = """Train one run after another, also after a reboot.

Example: restune queue add --base ./stable-diffusion-v1-5 --data ./watercolors --output ./out

Example: restune queue add --config run.yaml

Example: restune queue run --devices cuda:0 cuda:1

Example: restune queue list
"""

ADD_HELP = """Add a training run to the queue.

All flags are those of `restune train`, and two more: --queue FOLDER is the folder of the queue (RESTUNE_HOME/queue or
~/restune/queue if not given), and --queue-name TEXT the name in the queue (that of the output folder if not given).

Example: restune queue add --config run.yaml --output ./longer --steps 4000 --queue-name longer
"""


class AddCommand(BaseModel):
    """Entry of `add` in the list of actions; `parse_queue_options` gives its arguments to `parse_add_options`."""

    def run(self) -> None:
        """Not called."""
        raise NotImplementedError


_Action: TypeAlias = (
    Annotated[AddCommand, tyro.conf.subcommand("add", description=ADD_HELP)]
    | Annotated[ListOptions, tyro.conf.subcommand("list")]
    | Annotated[CancelOptions, tyro.conf.subcommand("cancel")]
    | Annotated[ResumeOptions, tyro.conf.subcommand("resume")]
    | Annotated[MoveOptions, tyro.conf.subcommand("move")]
    | Annotated[RemoveOptions, tyro.conf.subcommand("remove")]
    | Annotated[RunOptions, tyro.conf.subcommand("run")]
)

ACTIONS: dict[str, type[BaseModel]] = {
    "list": ListOptions,
    "cancel": CancelOptions,
    "resume": ResumeOptions,
    "move": MoveOptions,
    "remove": RemoveOptions,
    "run": RunOptions,
}
"""Classes of the options by action; `add` has those of `restune train`."""


class QueueCommand(BaseModel):
    """Entry of `queue` in the list of commands; `parse` gives its arguments to `parse_queue_options` instead."""

    def run(self) -> None:
        """Not called."""
        raise NotImplementedError


def parse_queue_options(args: Sequence[str]) -> Any:
    """Return the options of an action; invalid flags exit the process.

    Args:
        args: the arguments after `restune queue`.

    Raises:
        UsageError: if the action is missing or unknown, or a flag is invalid.
    """
    known = "add, list, cancel, resume, move, remove or run"
    if not args:
        raise UsageError(f"`restune queue` needs an action; give {known}.")
    if args[0] == "add":
        # Building the flags of training takes longer than everything else.
        from .add import parse_add_options

        return parse_add_options(ADD_HELP, args[1:])
    if args[0] in ACTIONS:
        check_flags(f"queue {args[0]}", ACTIONS[args[0]], args[1:])
    elif args[0] not in ("-h", "--help"):
        raise UsageError(f"There is no action {args[0]} of `restune queue`; give {known}.")
    return tyro.cli(_Action, prog="restune queue", description=QUEUE_HELP, args=args)
