"""Stand-in for ComfyUI: the contract of its model patcher, and its U-Net's order of calls on diffusers' modules.

After `comfy/model_patcher.py` and `comfy/ldm/modules/diffusionmodules/openaimodel.py` of ComfyUI.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel


class Sampling:
    """Noise levels from 10 to 0 by sampling progress, in the manner of `ModelSamplingDiscrete`."""

    def percent_to_sigma(self, percent: float) -> float:
        """Return the noise level at a sampling progress from 0 to 1; very large at the start."""
        return 999999999.9 if percent <= 0 else 10.0 * (1 - percent)


class ModelPatcher:
    """The part of ComfyUI's `ModelPatcher` used by output block patches."""

    def __init__(self, unet: UNet2DConditionModel, unet_config: dict[str, Any]) -> None:
        self.model = SimpleNamespace(diffusion_model=unet, model_config=SimpleNamespace(unet_config=unet_config))
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        """Return a patcher with the same model and a copy of the options."""
        cloned = ModelPatcher(self.model.diffusion_model, self.model.model_config.unet_config)
        cloned.model_options = copy.deepcopy(self.model_options)
        return cloned

    def get_model_object(self, name: str) -> Any:
        """Return a part of the model by its name."""
        return {"model_sampling": Sampling()}[name]

    def set_model_output_block_patch(self, patch: Any) -> None:
        """Add an output block patch."""
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches["output_block_patch"] = [*patches.get("output_block_patch", []), patch]

    def model_patches_to(self, target: Any) -> None:
        """Move the patches to a device and then to a dtype, as before sampling."""
        patches = self.model_options["transformer_options"].get("patches", {})
        for listed in patches.values():
            for number, patch in enumerate(listed):
                if hasattr(patch, "to"):
                    listed[number] = patch.to(target)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor, sigma: float) -> torch.Tensor:
        """Run the U-Net in ComfyUI's order: input blocks, middle block, output blocks with their patches."""
        unet = self.model.diffusion_model
        options = {**self.model_options["transformer_options"], "sigmas": torch.full((x.shape[0],), sigma)}
        emb = unet.time_embedding(unet.time_proj(time.expand(x.shape[0])))
        h = unet.conv_in(x)
        skips = [h]
        for block in unet.down_blocks:
            for layer, resnet in enumerate(block.resnets):
                h = self._layer(block, layer, resnet, h, emb, text)
                skips.append(h)
            if block.downsamplers is not None:
                h = block.downsamplers[0](h)
                skips.append(h)
        h = unet.mid_block(h, emb, encoder_hidden_states=text)
        number = 0
        for block in unet.up_blocks:
            for layer, resnet in enumerate(block.resnets):
                hsp = skips.pop()
                options["block"] = ("output", number)
                for patch in options.get("patches", {}).get("output_block_patch", []):
                    h, hsp = patch(h, hsp, options)
                h = self._layer(block, layer, resnet, torch.cat([h, hsp], dim=1), emb, text)
                number += 1
            if block.upsamplers is not None:
                h = block.upsamplers[0](h)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))

    @staticmethod
    def _layer(block: Any, layer: int, resnet: Any, h: torch.Tensor, emb: torch.Tensor, text: Any) -> torch.Tensor:
        h = resnet(h, emb)
        attentions = getattr(block, "attentions", None)
        return h if attentions is None else attentions[layer](h, encoder_hidden_states=text, return_dict=False)[0]
