"""Load a VAE that replaces that of the base."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..storage.base_files.tensor_header import TensorHeader
from ..storage.base_files.vae_config import is_diffusers_layout, vae_file_config
from ..storage.base_files.vae_location import check_vae_class, locate_vae
from ..utils.errors import RestuneError

logger = logging.getLogger(__name__)

# Names of the attention layers in files of diffusers before 0.18, such as those of stabilityai/sd-vae-ft-mse.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# Default of diffusers, for configs of before it had the setting.
_SCALING = 0.18215


def load_vae(vae: str, dtype: torch.dtype, *, replaced: Mapping[str, Any], channels: int) -> Any:
    """Load a VAE that replaces that of a base.

    Args:
        vae: folder in diffusers' format, safetensors file in the layout of diffusers or LDM, or id on the Hub.
        dtype: dtype of the weights.
        replaced: config of the base's own VAE. A file without a config has its scaling factor.
        channels: latent channels of the base's U-Net.

    Raises:
        RestuneError: if it does not exist, is not an autoencoder, or does not fit the U-Net.
    """
    place = locate_vae(vae)
    try:
        if place.header is not None:
            config: Mapping[str, Any] = vae_file_config(place.header, replaced)
            _check_fits(vae, config, replaced, channels)
            model = _from_file(place.header, config)
        else:
            config = AutoencoderKL.load_config(place.source)
            check_vae_class(vae, config.get("_class_name"))
            _check_fits(vae, config, replaced, channels)
            model = _from_folder(vae, str(place.source))
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, SafetensorError) as error:
        raise RestuneError(f"The VAE {vae} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return model.to(dtype).eval()


def _check_fits(vae: str, config: Mapping[str, Any], replaced: Mapping[str, Any], channels: int) -> None:
    latents = config.get("latent_channels", 4)
    if latents != channels:
        raise RestuneError(
            f"The VAE {vae} has {latents} latent channels, but the U-Net of the base has {channels}; give a VAE made "
            "for this base."
        )
    own, other = replaced.get("block_out_channels"), config.get("block_out_channels")
    if own is not None and other is not None and len(own) != len(other):
        raise RestuneError(
            f"The VAE {vae} makes images {2 ** (len(other) - 1)} times smaller, but that of the base "
            f"{2 ** (len(own) - 1)} times; give a VAE made for this base."
        )
    expected, found = replaced.get("scaling_factor", _SCALING), config.get("scaling_factor", _SCALING)
    if expected != found:
        logger.warning(
            "The VAE %s scales latents by %s, that of the base by %s. It may be made for another model family; then "
            "images are wrong in color and detail.",
            vae,
            found,
            expected,
        )


def _from_folder(vae: str, source: str) -> Any:
    with quiet_loading():
        model, report = AutoencoderKL.from_pretrained(source, output_loading_info=True)
    _check_complete(vae, sorted(report["missing_keys"]))
    return model


def _from_file(header: TensorHeader, config: Mapping[str, Any]) -> Any:
    if is_diffusers_layout(header):
        model = AutoencoderKL.from_config(dict(config))
        weights = {_current_name(name): value for name, value in load_file(header.path).items()}
        names = model.state_dict().keys()
        _check_complete(str(header.path), sorted(names - weights.keys()))
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        model.load_state_dict({name: value.reshape(shapes[name]) for name, value in weights.items() if name in names})
        return model
    with tempfile.TemporaryDirectory() as folder, quiet_loading():
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        model = AutoencoderKL.from_single_file(str(header.path), config=folder, local_files_only=True)
    _check_complete(str(header.path), [name for name, value in model.state_dict().items() if value.is_meta])
    return model


def _current_name(name: str) -> str:
    for old, new in _OLD_ATTENTION.items():
        if ".attentions." in name:
            name = name.replace(old, new)
    return name


def _check_complete(vae: str, missing: list[str]) -> None:
    if missing:
        raise RestuneError(
            f"The VAE {vae} cannot be loaded: it lacks {len(missing)} weights, such as `{missing[0]}`; download it "
            "again."
        )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Context manager without diffusers' progress bars and its warnings about empty lists of modules."""
    enabled, level = diffusers_logging.is_progress_bar_enabled(), diffusers_logging.get_verbosity()
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
        if enabled:
            diffusers_logging.enable_progress_bar()
