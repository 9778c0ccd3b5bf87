"""Command line of `restune train` and the scripts in `train/`: flags over a YAML file over a preset."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import ValidationError

from ..training.config.config_file import given_settings
from ..training.config.length.precedence import LENGTHS, without_replaced_length
from ..training.config.presets import PRESETS
from ..training.config.teacher.data import NO_DATA
from ..training.config.train_config import SETTINGS, TrainConfig
from ..training.config.tuner_settings import TUNER_ALIASES, command_line_class, with_families
from ..training.early_checks import check_before_training
from ..utils.display import counted
from ..utils.errors import UsageError
from ..utils.setting_groups import close_groups, first_refused_setting
from .foreign_flags.translate import translate
from .options.flag_check import check_flags
from .options.help_page import help_page
from .options.interruption import stoppable
from .options.setting_flags import current_flags, old_names_on_stderr, unchecked, with_flat_flags
from .quiet import quiet_libraries

if TYPE_CHECKING:
    _Flags = TrainConfig
else:
    _Flags = with_flat_flags(TrainConfig)


class TrainOptions(_Flags):
    """Flags of a training run: its settings, and a YAML file to read them from."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="YAML")] = None
    """YAML file with any of these settings, named as the flags with `_` instead of `-`. Flags override it. Each run
    writes its settings to OUTPUT/config.yaml."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            # Not a ValueError, which tyro would show in a box.
            raise UsageError(f"{first_refused_setting(type(self), error).sentence()}.") from error

    def settings(self) -> TrainConfig:
        """Return the settings of the run."""
        return TrainConfig(**{name: getattr(self, name) for name in with_families(TrainConfig).model_fields})

    def run(self) -> None:
        """Train a tuner, or the tuners of a sweep, and print their paths."""
        config = self.settings()
        check_before_training(config)
        with stoppable(lambda: "--resume continues a training run from its newest checkpoint"):
            self._train(config)

    def _train(self, config: TrainConfig) -> None:
        quiet_libraries()  # before the imports below, which emit warnings
        from ..training import sweep, train

        if config.sweep is not None:
            swept = sweep(config, stop_on_signal=True)
            print(f"Trained {counted(len(swept.rows), 'tuner')} in {swept.seconds:.0f} s: {swept.summary}")
            print(swept.table())
            if swept.sheet is not None:
                print(f"Samples: {swept.sheet}")
            return
        result = train(config, stop_on_signal=True)
        print(f"Trained {counted(result.steps, 'step')} in {result.seconds:.0f} s: {result.path}")
        if result.stopped_early is not None:
            print(f"Stopped early: {result.stopped_early}")
        if result.best is not None:
            print(f"Best: {result.best}")
        if result.samples:
            print(f"Samples: {result.samples[-1]}")


def parse_train_options(
    description: str | None,
    args: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> TrainOptions:
    """Parse the command line of a training run; invalid flags exit the process.

    Args:
        description: text of `--help` before the presets and the flags.
        args: the arguments; by default those of the process.
        prog: name of the program.
        defaults: settings that override a preset; a file and flags override them.

    Raises:
        SettingsError: if the file of `--config` cannot be read, or a setting in it is invalid.
    """
    args = _translated(current_flags(sys.argv[1:] if args is None else args))
    # Parsed first, because they change the defaults of other flags. tyro reports their errors with the others.
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, nargs="?")
    first.add_argument("--preset", nargs="?")
    first.add_argument("--teacher", nargs="?")
    for name in LENGTHS:
        first.add_argument(f"--{name}", nargs="?")
    first.add_argument("--tuner", nargs="*", default=[])
    known, _ = first.parse_known_args(args)
    with old_names_on_stderr():
        # Only an alias changes other defaults.
        tuner = known.tuner if set(known.tuner) & TUNER_ALIASES.keys() else None
        preset = known.preset if known.preset in PRESETS else None
        settings = given_settings(known.config, preset, defaults, tuner)
    settings = without_replaced_length(settings, vars(known))
    if known.teacher is not None or settings.get("teacher") is not None:
        # A run with a teacher needs no images; the settings check that it has prompts instead.
        settings.setdefault("data", NO_DATA)
    required = {name: tyro.MISSING for name, info in SETTINGS.items() if info.field.is_required()}
    options = command_line_class(TrainOptions)
    if {"-h", "--help"} & {*args}:
        print(help_page(prog or Path(sys.argv[0]).name, description or "", options, settings))
        sys.exit(0)
    check_flags("train", options, args, present=settings)
    return tyro.cli(
        options,
        prog=prog,
        description=description,
        args=args,
        default=unchecked(options, close_groups(with_families(TrainConfig), {**required, **settings})),
    )


def read_train_command(arguments: Sequence[str], defaults: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a command line of `restune train`, for a page that shows them.

    Args:
        arguments: arguments after `train`.
        defaults: values of the required settings, for a command that does not name them.

    Raises:
        RestuneError: if a flag or a value is not valid.
    """
    try:
        return parse_train_options(None, arguments, prog="restune train", defaults=defaults).settings()
    except SystemExit as error:
        # tyro has printed the reason in a box; the checks before it find almost all mistakes.
        raise UsageError("The command cannot be read; try it in a terminal, which shows the place.") from error


def _translated(args: Sequence[str]) -> list[str]:
    """Return arguments with the flags of diffusers or kohya replaced by ours; the new command goes to stderr."""
    own = {name.replace("-", "_") for name in (*SETTINGS, "config", "help")}
    translation = translate(args, own)
    if translation.program is not None:
        for notice in translation.notices:
            print(f"restune: {notice}", file=sys.stderr)
        command = shlex.join(["restune", "train", *translation.arguments])
        print(f"restune: flags of {translation.program}, translated: {command}", file=sys.stderr)
    return translation.arguments
