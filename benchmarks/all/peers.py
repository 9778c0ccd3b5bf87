"""Modules of other programs on a U-Net, by hooks: ms-swift's SCE tuner and Res-Tuning bypass, ControlNet, PEFT."""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch
from diffusers import ControlNetModel
from peft import LoraConfig
from torch import nn

from benchmarks.diffusers_lora import ATTENTION

SWIFT = "4.6.0"


def has_swift() -> bool:
    """Return whether the version of ms-swift that is compared is installed, with or without its dependencies."""
    try:
        return distribution("ms-swift").version == SWIFT and importlib.util.find_spec("einops") is not None
    except PackageNotFoundError:
        return False


def swift_module(path: str) -> Any:
    """Return a module of ms-swift from its file, because the package needs versions that others exclude."""
    stubs = {"swift": types.ModuleType("swift"), "swift.utils": types.ModuleType("swift.utils")}
    # All that the file needs of the rest of the package is a logger.
    stubs["swift.utils"].get_logger = logging.getLogger  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        file = distribution("ms-swift").locate_file(path)
        spec = importlib.util.spec_from_file_location(path.rsplit("/", 1)[-1].removesuffix(".py"), str(file))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, module_before in before.items():
            if module_before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module_before
    return module


def add_sce_tuner(unet: Any) -> nn.Module:
    """Add ms-swift's `SCEAdapter` to every skip connection, where its decoder mode has it; return the adapters."""
    adapter = swift_module("swift/tuners/scetuning/scetuning_components.py").SCEAdapter
    widths = [*reversed(_skip_widths(unet))]
    resnets = [resnet for block in unet.up_blocks for resnet in block.resnets]
    adapters = nn.ModuleList([adapter(dim=width, adapter_length=width) for width in widths]).to(unet.device)
    for resnet, each, width in zip(resnets, adapters, widths, strict=True):
        resnet.register_forward_pre_hook(partial(_through_adapter, each, width))
    return adapters


def _through_adapter(adapter: nn.Module, width: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, skip = torch.split(args[0], [args[0].shape[1] - width, width], 1)
    return torch.cat([hidden, adapter(skip)], 1), *args[1:]


def _skip_widths(unet: Any) -> list[int]:
    """Return the widths of the skip connections, shallow to deep."""
    widths = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        widths += [resnet.out_channels for resnet in block.resnets]
        widths += [sampler.out_channels for sampler in block.downsamplers or ()]
    return widths


class SwiftBypass(nn.Module):
    """Chain of ms-swift's `ResTuner` modules on the inputs of the up blocks, from the middle block to the output."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        tuner = swift_module("swift/tuners/restuning_components.py").ResTuner
        widths = [block.resnets[0].in_channels for block in unet.up_blocks]
        skips = [*reversed(_skip_widths(unet))]
        place = 0
        for number, block in enumerate(unet.up_blocks):
            widths[number] -= skips[place]
            place += len(block.resnets)
        widths.append(unet.conv_norm_out.num_channels)
        last = len(widths) - 1
        adapter: dict[str, Any] = {"res_group_adapter": {}}
        self.lateral = nn.ModuleList(tuner(w, n, last + 1, True, "lateral", adapter) for n, w in enumerate(widths))
        self.vertical = nn.ModuleList(tuner(w, n, last + 1, True, "vertical", adapter) for n, w in enumerate(widths))
        self.up = nn.ModuleList(
            tuner(w, n, last + 1, True, "aux", "upsample", upsample_out_channels=widths[n + 1])
            for n, w in enumerate(widths[:-1])
        )
        self.stems: list[torch.Tensor] = []

    def forward(self) -> torch.Tensor:
        """Return the output of the chain for the inputs of the up blocks of this forward pass."""
        stems, self.stems = [stem.detach() for stem in self.stems], []
        bypass = stems[0]
        for number, stem in enumerate(stems):
            bypass = self.lateral[number](stem) + self.vertical[number](bypass)
            if number < len(self.up):
                bypass = self.up[number](bypass, stems[number + 1].shape[2:])
        return bypass


def add_swift_bypass(unet: Any) -> nn.Module:
    """Add a chain of ms-swift's bypass modules to a U-Net, and return it."""
    chain = SwiftBypass(unet).to(unet.device)

    def before_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chain.stems.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def before_output(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        chain.stems.append(args[0])
        # Its last module adds to what it reads, so that its output replaces the feature, and at the start equals it.
        return (chain(),)

    for block in unet.up_blocks:
        block.register_forward_pre_hook(before_block, with_kwargs=True)
    unet.conv_norm_out.register_forward_pre_hook(before_output)
    return chain


SWIFT_MODULES = {"ms-swift SCETuning": add_sce_tuner, "ms-swift Res-bypass": add_swift_bypass}


def add_lora(unet: Any, rank: int, checkpointing: bool = False) -> nn.Module:
    """Add PEFT's LoRA to the attention layers, with an effect, and return the U-Net."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION, init_lora_weights="gaussian")
    unet.add_adapter(config, "peer")
    if checkpointing:
        unet.train()
        unet.enable_gradient_checkpointing()
    module: nn.Module = unet
    return module


class WithControlNet(nn.Module):
    """ControlNet of a U-Net's structure, and the U-Net that takes its residuals."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.net = ControlNetModel.from_unet(unet).requires_grad_(True)

    def forward(self, call: dict[str, Any]) -> torch.Tensor:
        """Return the U-Net's prediction with a gray condition image."""
        sample = call["sample"]
        image = sample.new_full((len(sample), 3, 8 * sample.shape[2], 8 * sample.shape[3]), 0.5)
        down, mid = self.net(**call, controlnet_cond=image, return_dict=False)
        predicted: torch.Tensor = self.unet(
            **call, down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False
        )[0]
        return predicted
