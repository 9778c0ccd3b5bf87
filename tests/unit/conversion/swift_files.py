"""Files in the layouts of ms-swift and SCEPTER, written according to their sources."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from restune_diffusion import BaseInfo

# Channels in ms-swift's `SCETuningConfig` for Stable Diffusion's decoder, deep to shallow.
READERS = [f"up_blocks.{block}.resnets.{layer}" for block in range(4) for layer in range(3)]


def sce_adapter(channels: int, width: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors of one `SCEAdapter`."""
    shapes = {"ln1.weight": (width, channels), "ln1.bias": (width,),
              "ln2.weight": (channels, width), "ln2.bias": (channels,)}  # fmt: skip
    return {name: (torch.randn(shape, generator=generator) * 0.2).to(dtype) for name, shape in shapes.items()}


def skip_channels(base: BaseInfo) -> list[int]:
    """Return the channels of the skip connections, deep to shallow."""
    return [site.channels for name, site in reversed(base.sites.items()) if name.startswith("skip.")]


def swift_tensors(
    base: BaseInfo, ratio: float = 0.5, dtype: torch.dtype = torch.float32, modules: list[str] | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors that ms-swift saves for the adapter `default`."""
    generator = torch.Generator().manual_seed(7)
    return {
        f"{module}.scetuner_default.tuner_op.{name}": tensor
        for module, channels in zip(modules or READERS, skip_channels(base), strict=True)
        for name, tensor in sce_adapter(channels, int(channels * ratio), generator, dtype).items()
    }


def write_swift(folder: Path, tensors: dict[str, torch.Tensor], **settings: object) -> Path:
    """Write a folder in the layout of `SwiftModel.save_pretrained`."""
    (folder / "default").mkdir(parents=True)
    save_file(tensors, folder / "default" / "adapter_model.safetensors", {"format": "pt"})
    config = {"swift_type": "SCETuning", "tuner_mode": "decoder", **settings}
    (folder / "default" / "adapter_config.json").write_text(json.dumps(config))
    return folder
