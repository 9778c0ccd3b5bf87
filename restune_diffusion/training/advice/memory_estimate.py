"""Count the memory that a training step needs, from the configs of the base alone, before anything is loaded."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...hooks.attachment import attach
from ...hooks.manager import TunerManager
from ...pipelines.load_base import PRECISIONS
from ...storage.base_files.configs import model_configs
from ...storage.base_files.contents import family_of
from ...storage.base_files.location import local_base
from ...storage.base_files.prediction import read_prediction
from ...storage.base_files.tensor_header import read_tensor_header
from ...tuners.tuner import Tuner
from ..build import tuner_autocast
from ..config.train_config import TrainConfig
from ..state import ATTACHED_NAME

# Two counts at once would take the memory of two.
_LOCK = threading.Lock()
# weight, gradient and two moments of Adam, four bytes each
_BYTES_PER_PARAMETER = 16
_ACTIVATION_SCALE = 8


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step needs on its device, by purpose.

    Attributes:
        weights: frozen weights of the U-Net, and of the text encoders if a text part is trained.
        tuner: the tuner, its gradient and the moments of the optimizer.
        kept: tensors that the forward pass keeps for the backward pass.
    """

    weights: int
    tuner: int
    kept: int

    @property
    def total(self) -> int:
        """Sum of all purposes."""
        return self.weights + self.tuner + self.kept


def estimate_memory(config: TrainConfig) -> MemoryEstimate | None:
    """Return the memory of a training step, or None if the configs of the base are not on this machine.

    Tensors have shapes but no values, so this runs anywhere. The count excludes the program itself, the workspace of
    kernels, and the autoencoder, which works only before the first step and for samples.

    Args:
        config: settings of the run.

    Raises:
        RestuneError: if the base is something else, or the tuner does not fit it.
    """
    key = config.model_dump_json(include={"base", "tuner", "batch_size", "memory", *config.kinds})
    # The resolution alone, because the other settings of the data do not change the shapes.
    return _estimate(key, config.data.resolution, _Hidden(config))


@dataclass(frozen=True)
class _Hidden:
    """A config that does not take part in the key of a cache."""

    config: TrainConfig

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=32)
def _estimate(key: str, resolution: int | None, hidden: _Hidden) -> MemoryEstimate | None:
    config = hidden.config
    structure = _structure(config.base)
    if structure is None:
        return None
    dtype = PRECISIONS[config.memory.mixed_precision]
    with _LOCK:
        unet, mode = build_unet(structure.unet, dtype)
        size = unet.config.sample_size
        side = resolution or (size if isinstance(size, int) else min(size)) * structure.latent_scale
        tuner = Tuner.for_base(unet, *[part for part in config.parts if not part.acts_on_text_encoders])
        tuner.autocast = tuner_autocast(config.memory.mixed_precision, unet)
        with mode:
            drop_values(tuner)
        with attach(unet, tuner, ATTACHED_NAME), mode:
            manager = TunerManager.of(unet)
            if config.conditioned is not None and manager is not None:
                shape = config.batch_size, config.conditioned.channels, side, side
                manager.set_conditions(ATTACHED_NAME, [torch.rand(shape) for _ in config.conditioned.conditions])
            kept = kept_bytes(unet, tuner, config, side, structure.latent_scale)
    weights = sum(parameter.numel() for parameter in unet.parameters()) * dtype.itemsize
    if config.learns_from_text:
        weights += structure.text_parameters * dtype.itemsize
    return MemoryEstimate(weights, tuner.num_parameters() * _BYTES_PER_PARAMETER, kept)


@dataclass(frozen=True)
class _Structure:
    """Config of the U-Net, pixels per position of the latents, and number of parameters of the text encoders."""

    unet: Mapping[str, Any]
    latent_scale: int
    text_parameters: int


def _structure(base: str) -> _Structure | None:
    path = local_base(base)
    if path is not None and path.is_file():
        header = read_tensor_header(path)
        family = family_of(header)
        configs = model_configs(header, family, v_prediction=read_prediction(header, family).v_prediction).models
        names = [name for name in header.shapes if name.startswith(("cond_stage_model.", "conditioner."))]
        text = sum(prod(header.shapes[name]) for name in names)
        return _Structure(configs["unet"], _scale(configs["vae"]), text)
    unet, vae = (_read_config(base, path, part) for part in ("unet", "vae"))
    if unet is None or vae is None:
        return None
    encoders = [] if path is None else sorted(path.glob("text_encoder*/*.safetensors"))
    # Several precisions of one encoder lie in one folder.
    files = {file.parent: file for file in encoders}.values()
    text = sum(prod(shape) for file in files for shape in read_tensor_header(file).shapes.values())
    return _Structure(unet, _scale(vae), text)


def _read_config(base: str, path: Path | None, part: str) -> dict[str, Any] | None:
    file: Any = (
        path / part / "config.json" if path is not None else try_to_load_from_cache(base, f"{part}/config.json")
    )
    try:
        config = json.loads(Path(file).read_text("utf-8")) if isinstance(file, str | Path) else None
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _scale(vae: Mapping[str, Any]) -> int:
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def kept_bytes(unet: Any, tuner: Tuner, config: TrainConfig, side: int, latent_scale: int = _ACTIVATION_SCALE) -> int:
    """Return the bytes that autograd saves in one forward pass of a batch, each storage once, without parameters.

    Args:
        unet: U-Net without values.
        tuner: the attached tuner, without values.
        config: settings of the run.
        side: side of the images in pixels.
        latent_scale: pixels per position of the latents.
    """
    held = {parameter.untyped_storage()._cdata: parameter for parameter in (*unet.parameters(), *tuner.parameters())}
    dtype, batch = PRECISIONS[config.memory.mixed_precision], config.batch_size
    added = {}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {
            "text_embeds": torch.randn(batch, pooled, dtype=dtype),
            "time_ids": torch.randn(batch, 6, dtype=dtype),
        }
    latents = torch.randn(batch, unet.config.in_channels, side // latent_scale, side // latent_scale, dtype=dtype)
    text = torch.randn(batch, 77, unet.config.cross_attention_dim, dtype=dtype)
    timesteps = torch.zeros(batch, dtype=torch.long)
    with kept_storages() as storages:
        unet(latents, timesteps, text, added_cond_kwargs=added or None)
    return sum(storage.nbytes() for key, storage in storages.items() if key not in held)


@contextmanager
def kept_storages() -> Iterator[dict[int, torch.UntypedStorage]]:
    """Context manager that records the storages autograd saves inside it, parameters included, keyed by `_cdata`."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # the reference prevents reuse of the address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def build_unet(structure: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, FakeTensorMode]:
    """Return a frozen U-Net without values, and the fake tensor mode to run it in."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        unet = UNet2DConditionModel.from_config(dict(structure)).eval().requires_grad_(False)
        # torch's default dtype belongs to the whole process, so the dtype is set here.
        drop_values(unet, dtype)
    return unet, mode


def drop_values(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the parameters of a module by ones without values; call it in a fake tensor mode.

    `Module.to` cannot do it: it swaps tensors, which those without values do not allow.

    Args:
        module: the module.
        dtype: dtype of the parameters; their own if None.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, dtype=dtype)
            setattr(part, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
