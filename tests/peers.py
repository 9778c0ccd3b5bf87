"""Features used together with tuners, at tiny size: context managers that enable one and yield its arguments."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from .tiny_pipelines import Kind, pictures


def nothing(pipe: Any, kind: Kind) -> contextlib.AbstractContextManager[dict[str, Any]]:
    """Return a context manager that does not change the pipeline."""
    return contextlib.nullcontext({})


@contextlib.contextmanager
def freeu(pipe: Any, kind: Kind) -> Iterator[dict[str, Any]]:
    """Context manager with FreeU enabled, with factors of the usual size."""
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    try:
        yield {}
    finally:
        pipe.disable_freeu()


@contextlib.contextmanager
def ip_adapter(pipe: Any, kind: Kind) -> Iterator[dict[str, Any]]:
    """Context manager with an IP-Adapter of random weights; yields its image argument."""
    encoder, processor = pipe.image_encoder, pipe.feature_extractor
    pipe.load_ip_adapter(_ip_adapter_weights(pipe.unet, encoder.config.projection_dim), subfolder="", weight_name="")
    try:
        yield {"ip_adapter_image": pictures(1, seed=5)[0]}
    finally:
        pipe.unload_ip_adapter()
        pipe.register_modules(image_encoder=encoder, feature_extractor=processor)


@contextlib.contextmanager
def lora(pipe: Any, kind: Kind) -> Iterator[dict[str, Any]]:
    """Context manager with a LoRA of random weights, loaded by diffusers."""
    pipe.load_lora_weights(_lora_weights(pipe.unet), adapter_name="lora")
    try:
        yield {}
    finally:
        pipe.unload_lora_weights()


def _ip_adapter_weights(unet: UNet2DConditionModel, image_width: int, tokens: int = 4) -> dict[str, Any]:
    """Return weights in the layout of IP-Adapter files: two projections per cross-attention, with odd numbers."""
    generator = torch.Generator().manual_seed(3)
    text_width = unet.config.cross_attention_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.5

    projections = {}
    cross_attentions = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(cross_attentions):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for projection in ("to_k_ip", "to_v_ip"):
            projections[f"{2 * number + 1}.{projection}.weight"] = random(width, text_width)
    image_projection = {
        "proj.weight": random(tokens * text_width, image_width),
        "proj.bias": random(tokens * text_width),
        "norm.weight": torch.ones(text_width),
        "norm.bias": torch.zeros(text_width),
    }
    return {"image_proj": image_projection, "ip_adapter": projections}


@lru_cache(maxsize=2)
def _lora_weights(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        copied = copy.deepcopy(unet)
        targets = ["to_q", "to_v", "to_out.0"]
        copied.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(copied))
    return {f"unet.{name}": tensor for name, tensor in state.items()}
