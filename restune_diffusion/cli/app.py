"""Parse the command line and run the chosen command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, TypeAlias

import tyro
from pydantic import BaseModel

from ..utils.errors import UsageError
from ..utils.settings_merge import unknown_name
from ..utils.version import __version__
from .convert import ConvertOptions
from .data.command import ACTIONS, DATA_HELP, DataCommand, parse_data_options
from .demo import DemoOptions
from .evaluate import EvaluateOptions
from .generate import GenerateOptions
from .grid import GridOptions
from .guard import run_guarded
from .inspect import InspectOptions
from .merge import MergeOptions
from .options.flag_check import check_flags
from .queue.command import ACTIONS as QUEUE_ACTIONS
from .queue.command import QUEUE_HELP, QueueCommand, parse_queue_options
from .report import ReportOptions
from .serve.command import ServeOptions
from .studio import StudioOptions

if TYPE_CHECKING:
    from .queue.add import AddOptions
    from .train import TrainOptions

TRAIN_HELP = """Train a tuner on a folder of images.

--base, --data and --output are required, as flags or in the YAML file of --config. All other settings have defaults. A
switch such as --flip is turned off by --no-flip.

Example: restune train --base ./stable-diffusion-v1-5 --data ./watercolors --output ./out
--steps 2000 --mixed-precision fp16 --validation.prompts "a fox" "a lighthouse"

Example: restune train --config run.yaml --steps 500 --output ./shorter
"""

# tyro shows pydantic's message for an invalid value; omit its link to pydantic's manual.
os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")


class TrainCommand(BaseModel):
    """Entry of `train` in the list of commands; `parse` gives its arguments to `parse_train_options` instead.

    Building the flags of training takes longer than everything else that another command imports.
    """

    def run(self) -> None:
        """Not called."""
        raise NotImplementedError


Command: TypeAlias = (
    Annotated[TrainCommand, tyro.conf.subcommand("train", description=TRAIN_HELP)]
    | Annotated[GenerateOptions, tyro.conf.subcommand("generate")]
    | Annotated[GridOptions, tyro.conf.subcommand("grid")]
    | Annotated[EvaluateOptions, tyro.conf.subcommand("evaluate")]
    | Annotated[ReportOptions, tyro.conf.subcommand("report")]
    | Annotated[DataCommand, tyro.conf.subcommand("data", description=DATA_HELP)]
    | Annotated[QueueCommand, tyro.conf.subcommand("queue", description=QUEUE_HELP)]
    | Annotated[InspectOptions, tyro.conf.subcommand("inspect")]
    | Annotated[ConvertOptions, tyro.conf.subcommand("convert")]
    | Annotated[MergeOptions, tyro.conf.subcommand("merge")]
    | Annotated[ServeOptions, tyro.conf.subcommand("serve")]
    | Annotated[StudioOptions, tyro.conf.subcommand("studio")]
    | Annotated[DemoOptions, tyro.conf.subcommand("demo")]
)


_COMMANDS: dict[str, type[BaseModel]] = {
    "generate": GenerateOptions,
    "grid": GridOptions,
    "evaluate": EvaluateOptions,
    "report": ReportOptions,
    **{f"data {action}": options for action, options in ACTIONS.items()},
    **{f"queue {action}": options for action, options in QUEUE_ACTIONS.items()},
    "inspect": InspectOptions,
    "convert": ConvertOptions,
    "merge": MergeOptions,
    "serve": ServeOptions,
    "studio": StudioOptions,
    "demo": DemoOptions,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        args: command-line arguments; those of the process by default.
    """
    given = sys.argv[1:] if args is None else args
    if list(given) == ["--version"]:
        print(f"restune-diffusion {__version__}")
        sys.exit(0)
    sys.exit(run_guarded(lambda: parse(given).run()))


def parse(args: Sequence[str]) -> Command | TrainOptions | AddOptions:
    """Return the options of the chosen command; `train` also accepts a YAML file of settings."""
    if args[:1] == ["train"]:
        from .train import parse_train_options

        return parse_train_options(TRAIN_HELP, args[1:], prog="restune train")
    if args[:1] == ["data"]:
        return parse_data_options(args[1:])
    if args[:1] == ["queue"]:
        return parse_queue_options(args[1:])
    if args and args[0] in _COMMANDS:
        check_flags(args[0], _COMMANDS[args[0]], args[1:])
    elif args and args[0] not in ("-h", "--help"):
        known = ["train", *dict.fromkeys(name.split()[0] for name in _COMMANDS)]
        raise UsageError(unknown_name(args[0], known).replace("setting", "command", 1))
    return tyro.cli(
        Command,
        prog="restune",
        description="Customize Stable Diffusion with detachable tuners. `restune --version` prints the version.",
        args=args,
    )
