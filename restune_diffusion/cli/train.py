"""Command line of `restune train` and the scripts in `train/`: flags over a YAML file over a preset."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..training.config.config_file import given_settings
from ..training.config.presets import PRESETS
from ..training.config.train_config import SETTINGS, TrainConfig
from ..training.config.tuner_settings import command_line_class, with_families
from ..utils.display import counted
from ..utils.setting_groups import close_groups
from .options.setting_flags import current_flags, old_names_on_stderr, unchecked, with_flat_flags
from .quiet import quiet_libraries

TRAIN_HELP = """Train a tuner on a folder of images.

The settings --base, --data and --output are required, as flags or in the YAML file of --config. All others have
defaults.

Example: restune train --base ./stable-diffusion-v1-5 --data ./watercolors --output ./out
--steps 2000 --mixed-precision fp16 --validation.prompts "a fox" "a lighthouse"

Example: restune train --config run.yaml --steps 500 --output ./shorter
"""


if TYPE_CHECKING:
    _Flags = TrainConfig
else:
    _Flags = with_flat_flags(TrainConfig)


class TrainOptions(_Flags):
    """Flags of a training run: its settings, and a YAML file to read them from."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="YAML")] = None
    """YAML file with any of these settings, named as the flags with `_` instead of `-`. Flags override it. Each run
    writes its settings to OUTPUT/config.yaml."""

    def settings(self) -> TrainConfig:
        """Return the settings of the run."""
        return TrainConfig(**{name: getattr(self, name) for name in with_families(TrainConfig).model_fields})

    def run(self) -> None:
        """Train a tuner, or the tuners of a sweep, and print their paths."""
        quiet_libraries()  # before the imports below, which emit warnings
        from ..training import sweep, train

        config = self.settings()
        if config.sweep is not None:
            swept = sweep(config, stop_on_signal=True)
            print(f"Trained {counted(len(swept.rows), 'tuner')} in {swept.seconds:.0f} s: {swept.summary}")
            print(swept.table())
            if swept.sheet is not None:
                print(f"Samples: {swept.sheet}")
            return
        result = train(config, stop_on_signal=True)
        print(f"Trained {counted(result.steps, 'step')} in {result.seconds:.0f} s: {result.path}")
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
    args = current_flags(sys.argv[1:] if args is None else args)
    # Parsed first, because they change the defaults of the other flags. tyro reports their errors with the others.
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, nargs="?")
    first.add_argument("--preset", nargs="?")
    known, _ = first.parse_known_args(args)
    with old_names_on_stderr():
        settings = given_settings(known.config, known.preset if known.preset in PRESETS else None, defaults)
    required = {name: tyro.MISSING for name, info in SETTINGS.items() if info.field.is_required()}
    options = command_line_class(TrainOptions)
    return tyro.cli(
        options,
        prog=prog,
        description="\n\n".join([description or "", _presets_help()]),
        args=args,
        default=unchecked(options, close_groups(with_families(TrainConfig), {**required, **settings})),
    )


def _presets_help() -> str:
    return "\n\n".join(["Presets:", *(f"{name}, for {preset.describe()}" for name, preset in PRESETS.items())])
