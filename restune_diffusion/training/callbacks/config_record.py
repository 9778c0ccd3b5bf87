"""Callback that writes the settings of a run to its output folder."""

from __future__ import annotations

from ...utils.atomic_write import atomic_write
from ..config.config_file import config_yaml
from ..output_folder import CONFIG_FILE
from ..state import TrainState
from .base import Callback

_HEADER = "# Settings of this run. To repeat it: restune train --config config.yaml --output OTHER\n"


class ConfigFile(Callback):
    """Write `config.yaml`; a resumed run, which may have other settings, overwrites it."""

    def on_start(self, run: TrainState) -> None:
        """Write the file."""
        if run.accelerator.is_main_process:
            with atomic_write(run.config.output / CONFIG_FILE) as file:
                file.write((_HEADER + config_yaml(run.config)).encode())
