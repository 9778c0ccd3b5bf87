"""Describe a base from the config of its checkpoint, without loading weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..backbones import BaseInfo, TextEncoder, describe_base, describe_text, module_path
from ..backbones.description import TextInfo
from ..storage.base_files.configs import ModelConfigs, model_configs
from ..storage.base_files.contents import family_of
from ..storage.base_files.location import local_base
from ..storage.base_files.prediction import read_prediction
from ..storage.base_files.tensor_header import read_tensor_header
from ..utils.errors import RestuneError
from .names import text_path
from .products.options import BaseWeights

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.safetensors",
            "model.fp16.safetensors")  # fmt: skip


def describe_checkpoint(base: str) -> BaseInfo:
    """Read the structure of a Stable Diffusion checkpoint, with its text encoders.

    Args:
        base: a checkpoint directory in diffusers' layout, its U-Net directory, a single file in the original layout,
            or a repository id on the Hub.

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
    return describe_base(unet).model_copy(update={"text": _text(base)})


def checkpoint_weights(base: str) -> BaseWeights:
    """Return a function from the site of a linear layer to its weight in a checkpoint folder.

    The function raises `RestuneError` if the folder has no such weight in safetensors files.
    """
    files: dict[str, Path] = {}

    def weight(site: str) -> torch.Tensor:
        component, _, path = text_path(site).partition(".") if site.startswith("text_encoder") else ("unet", "", "")
        key = f"{path or module_path(site)}.weight"
        if component not in files:
            files[component] = _weights_file(base, component)
        with safe_open(files[component], framework="pt") as opened:
            for name in (key, key.removeprefix("text_model.")):
                if name in opened.keys():  # noqa: SIM118 -- not a mapping
                    return opened.get_tensor(name)
        raise RestuneError(f"{files[component]} has no weight `{key}`, which converting DoRA needs.")

    return weight


def _weights_file(base: str, component: str) -> Path:
    path = Path(base).expanduser()
    # The U-Net's own directory is accepted as a base too.
    folders = [path / component, *([path] if component == "unet" else [])]
    for folder in folders:
        for name in _WEIGHTS:
            if (folder / name).is_file():
                return folder / name
    raise RestuneError(
        f"Converting DoRA needs the weights of the base, but {path / component} has no {_WEIGHTS[0]}; pass the "
        "folder of the checkpoint in diffusers' layout with --base."
    )


def _text(base: str) -> dict[str, TextInfo]:
    """Return the structure of a checkpoint's CLIP text encoders; empty if there are none."""
    found = {}
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        config = _text_config(base, name)
        if config is None:
            continue
        with torch.device("meta"):
            encoder = kind(config)
        found[name] = TextEncoder(encoder, SimpleNamespace(vocab_size=config.vocab_size))
    return describe_text(found)


def _text_config(base: str, name: str) -> CLIPTextConfig | None:
    path = local_base(base, needs_index=False)
    if path is not None and path.is_file():
        config = _single_file(path).models.get(name)
        return None if config is None else CLIPTextConfig(**config)
    if path is not None and not (path / name / "config.json").is_file():
        return None
    try:
        return CLIPTextConfig.from_pretrained(base if path is None else str(path), subfolder=name)
    except (OSError, ValueError):
        return None


def _single_file(path: Path) -> ModelConfigs:
    header = read_tensor_header(path)
    family = family_of(header)
    return model_configs(header, family, v_prediction=read_prediction(header, family).v_prediction)


def _config(base: str) -> dict[str, Any]:
    path = local_base(base, needs_index=False)
    if path is None:
        return _read(base, base, "unet")
    if path.is_file():
        return {**_single_file(path).models["unet"], "_name_or_path": str(path)}
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
