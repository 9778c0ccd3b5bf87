"""Describe a base from the config of its checkpoint, without loading weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..backbones import BaseInfo, describe_base
from ..storage.base_files.configs import model_configs
from ..storage.base_files.contents import family_of
from ..storage.base_files.location import local_base
from ..storage.base_files.prediction import read_prediction
from ..storage.base_files.tensor_header import read_tensor_header
from ..utils.errors import RestuneError


def describe_checkpoint(base: str) -> BaseInfo:
    """Read the structure of a Stable Diffusion checkpoint.

    Args:
        base: a checkpoint directory in diffusers' layout, its U-Net directory, a single file in the original layout, or
            a repository id on the Hub.

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
    path = local_base(base, needs_index=False)
    if path is None:
        return _read(base, base, "unet")
    if path.is_file():
        header = read_tensor_header(path)
        family = family_of(header)
        prediction = read_prediction(header, family)
        unet = model_configs(header, family, v_prediction=prediction.v_prediction).models["unet"]
        return {**unet, "_name_or_path": str(path)}
    # A pipeline's directory has the U-Net in a subfolder; a U-Net's own directory has config.json at its top.
    subfolder = None if (path / "config.json").is_file() else "unet"
    return _read(base, str(path), subfolder)


def _read(base: str, source: str, subfolder: str | None) -> dict[str, Any]:
    try:
        config: dict[str, Any] = UNet2DConditionModel.load_config(source, subfolder=subfolder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RestuneError(f"The base {base} cannot be read: {reason}") from error
    config["_name_or_path"] = str(Path(source) / subfolder) if source != base and subfolder else base
    return config
