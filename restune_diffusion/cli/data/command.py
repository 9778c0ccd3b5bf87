"""`restune data`: choose between its actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import tyro
from pydantic import BaseModel

from ...utils.errors import UsageError
from ..options.flag_check import check_flags
from .caption import CaptionOptions
from .edit import EditOptions
from .inspect import InspectDataOptions

DATA_HELP = """Check, caption and edit a data folder.

Example: restune data inspect ./watercolors --base ./stable-diffusion-v1-5 --bucketing --sheet sheet.png

Example: restune data caption ./watercolors --captioner transformers --model ./blip-image-captioning-base

Example: restune data edit ./watercolors --find "a painting of " --replace "" --dry-run
"""

_Action: TypeAlias = (
    Annotated[InspectDataOptions, tyro.conf.subcommand("inspect")]
    | Annotated[CaptionOptions, tyro.conf.subcommand("caption")]
    | Annotated[EditOptions, tyro.conf.subcommand("edit")]
)

ACTIONS: dict[str, type[BaseModel]] = {
    "inspect": InspectDataOptions,
    "caption": CaptionOptions,
    "edit": EditOptions,
}
"""Classes of the options by action."""


class DataCommand(BaseModel):
    """Entry of `data` in the list of commands; `parse` gives its arguments to `parse_data_options` instead."""

    def run(self) -> None:
        """Not called."""
        raise NotImplementedError


def parse_data_options(args: Sequence[str]) -> Any:
    """Return the options of an action; invalid flags exit the process.

    Args:
        args: the arguments after `restune data`.

    Raises:
        UsageError: if the action is missing or unknown, or a flag is invalid.
    """
    if not args:
        raise UsageError("`restune data` needs an action; give inspect, caption or edit.")
    if args[0] in ACTIONS:
        check_flags(f"data {args[0]}", ACTIONS[args[0]], args[1:])
    elif args[0] not in ("-h", "--help"):
        raise UsageError(f"There is no action {args[0]} of `restune data`; give inspect, caption or edit.")
    return tyro.cli(_Action, prog="restune data", description=DATA_HELP, args=args)
