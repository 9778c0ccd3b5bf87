"""Options shared by the commands that generate images, and checks before the libraries are imported."""

from __future__ import annotations

from typing import Any

from ...pipelines.sampling.settings import SamplingSettings
from ...storage.base_files.check import check_base
from ...utils.weighted_path import split_weight
from .early_checks import check_device, check_exists, check_tuners
from .outputs import OverwriteOption


class SamplingOptions(OverwriteOption, SamplingSettings):
    """Base, prompts, tuners and sampler settings of generated images."""

    def check_inputs(self) -> None:
        """Check base, VAE, tuner files and device, before the libraries are imported.

        Raises:
            RestuneError: if one of them does not exist.
        """
        check_base(self.base, self.vae)
        check_tuners(split_weight(argument)[0] for argument in self.tuner)
        check_exists((split_weight(argument)[0] for argument in self.lora), "LoRA")
        check_device(self.device)

    def load(self) -> Any:
        """Return the pipeline with the tuners loaded and their weights set."""
        from .placement import load_placed

        weights = self.check()
        return self.prepare(load_placed(self.base, self.device, self.dtype, self.vae), weights)
