"""Load a single-file Stable Diffusion checkpoint in the original LDM layout, without network access."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch import nn
from transformers import CLIPTokenizer

from ..storage.base_files.check import check_suffix
from ..storage.base_files.configs import ModelConfigs, model_configs, native_pixels, own_vae_config
from ..storage.base_files.contents import UNET, Family, family_of
from ..storage.base_files.prediction import Prediction, read_prediction
from ..storage.base_files.tensor_header import TensorHeader, read_tensor_header
from ..utils.errors import RestuneError
from .stable_diffusion import (
    RestuneStableDiffusionInpaintPipeline,
    RestuneStableDiffusionPipeline,
    RestuneStableDiffusionXLInpaintPipeline,
    RestuneStableDiffusionXLPipeline,
)
from .vae import load_vae, quiet_loading

_TOKENIZER = files("restune_diffusion") / "assets" / "restune-tiny" / "tokenizer"
"""CLIP's tokenizer, which all Stable Diffusion models share."""
# OpenCLIP's text encoders pad with token 0, the first encoder of every model with the end token.
_PAD_FIRST, _PAD_OPEN_CLIP = "<|endoftext|>", "!"
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def load_single_file(path: Path, dtype: torch.dtype, vae: str | None = None) -> Any:
    """Load a checkpoint file as a pipeline with `RestuneLoaderMixin`.

    The model configs come from the shapes in the file, the prediction type from the marks that other programs leave
    (`storage.base_files.prediction`), and the tokenizer from the package.

    Args:
        path: a safetensors file of SD 1.x, 2.x or XL, or of an inpainting variant.
        dtype: dtype of all models.
        vae: VAE that replaces that of the file.

    Raises:
        RestuneError: if the file is something else, incomplete, or a pickle.
    """
    check_suffix(path)
    header = read_tensor_header(path)
    family = family_of(header, has_vae=vae is not None)
    prediction = read_prediction(header, family)
    other = None if vae is None else _other_vae(vae, dtype, header, family, prediction)
    configs = model_configs(
        header,
        family,
        v_prediction=prediction.v_prediction,
        vae=None if other is None else {**other.config, "_class_name": "AutoencoderKL"},
    )
    with _config_folder(configs) as folder, quiet_loading():
        try:
            pipeline = _pipeline_class(configs).from_single_file(
                str(path),
                config=str(folder),
                torch_dtype=dtype,
                local_files_only=True,
                scheduler=_scheduler(family, prediction),
                **_tokenizers(family),
                **({} if other is None else {"vae": other}),
            )
        except NotImplementedError as error:
            # diffusers places a model whose weights are not all in the file, which torch refuses.
            raise RestuneError(
                f"The base {path} cannot be loaded: weights of a model are missing; download the checkpoint again."
            ) from error
    _check_complete(path, pipeline)
    return pipeline


def _other_vae(vae: str, dtype: torch.dtype, header: TensorHeader, family: Family, prediction: Prediction) -> Any:
    own = own_vae_config(header, family, native_pixels(family, v_prediction=prediction.v_prediction))
    channels = header.shapes.get(f"{UNET}out.2.weight", (0,))[0]
    return load_vae(vae, dtype, replaced=own, channels=channels)


def _pipeline_class(configs: ModelConfigs) -> Any:
    if configs.family == "sdxl":
        plain, inpainting = RestuneStableDiffusionXLPipeline, RestuneStableDiffusionXLInpaintPipeline
    else:
        plain, inpainting = RestuneStableDiffusionPipeline, RestuneStableDiffusionInpaintPipeline
    return inpainting if configs.inpainting else plain


def _tokenizers(family: Family) -> dict[str, Any]:
    pads = [_PAD_OPEN_CLIP if family == "sd2" else _PAD_FIRST, *([_PAD_OPEN_CLIP] if family == "sdxl" else [])]
    return {
        name: CLIPTokenizer.from_pretrained(str(_TOKENIZER), pad_token=pad)
        for name, pad in zip(("tokenizer", "tokenizer_2"), pads, strict=False)
    }


def _scheduler(family: Family, prediction: Prediction) -> Any:
    """Return the scheduler of the family's published repository, or one that supports the prediction."""
    settings: dict[str, Any] = {
        **_SCHEDULE,
        "prediction_type": "v_prediction" if prediction.v_prediction else "epsilon",
    }
    if prediction.zero_terminal_snr:
        # Only trailing steps reach the last, pure-noise step (arXiv 2305.08891, section 3.3).
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if family == "sdxl":
        return EulerDiscreteScheduler(**{"timestep_spacing": "leading", **settings})
    if family == "sd1" and not (prediction.v_prediction or prediction.zero_terminal_snr):
        return PNDMScheduler(**settings, skip_prk_steps=True)
    return DDIMScheduler(**settings, clip_sample=False, set_alpha_to_one=False)


@contextmanager
def _config_folder(configs: ModelConfigs) -> Iterator[Path]:
    """Yield a temporary folder with the configs in diffusers' layout, which `from_single_file` reads."""
    index: dict[str, Any] = {
        "_class_name": _pipeline_class(configs).__name__.removeprefix("Restune"),
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
    }
    if configs.family == "sdxl":
        index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"], "image_encoder": [None, None]}
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for component, config in configs.models.items():
            library = "transformers" if component.startswith("text_encoder") else "diffusers"
            index[component] = [library, config.get("_class_name") or config["architectures"][0]]
            _write(folder / component / "config.json", config)
        _write(folder / "model_index.json", index)
        yield folder


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def _check_complete(path: Path, pipeline: Any) -> None:
    """Refuse a checkpoint that left weights without values."""
    for name, component in pipeline.components.items():
        if not isinstance(component, nn.Module):
            continue
        missing = [key for key, value in component.state_dict().items() if value.is_meta]
        if missing:
            raise RestuneError(
                f"The base {path} cannot be loaded: `{name}` lacks {len(missing)} weights, such as `{missing[0]}`; "
                "download the checkpoint again."
            )
