"""Describe a base from the config of its checkpoint, without loading weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..backbones import BaseInfo, describe_base
from ..utils.errors import RestuneError


def describe_checkpoint(base: str) -> BaseInfo:
    """Read the structure of a Stable Diffusion checkpoint in diffusers' layout.

    Args:
        base: a checkpoint directory, its U-Net directory, or a repository id on the Hub.

    Raises:
        RestuneError: if there is no U-Net config, or the denoiser is of an unsupported class.
    """
    config = _config(base)
    if config.get("_class_name") != "UNet2DConditionModel":
        raise RestuneError(f"The base {base} has no UNet2DConditionModel, the only denoiser supported here.")
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise RestuneError(f"The base {base} has an invalid U-Net config: {str(error).splitlines()[0]}") from error
    return describe_base(unet)


def _config(base: str) -> dict[str, Any]:
    path = Path(base).expanduser()
    # A pipeline's directory has the U-Net in a subfolder; a U-Net's own directory has config.json at its top.
    subfolder = None if (path / "config.json").is_file() else "unet"
    try:
        config = UNet2DConditionModel.load_config(str(path) if path.exists() else base, subfolder=subfolder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RestuneError(f"The base {base} cannot be read: {reason}") from error
    config["_name_or_path"] = str(path / subfolder) if path.exists() and subfolder else base
    return config
