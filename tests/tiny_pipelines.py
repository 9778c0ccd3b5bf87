"""All public pipeline classes on random components with Stable Diffusion's exact structure at small widths."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import restune_diffusion
from restune_diffusion import BypassConfig, ResConfig, SkipConfig, Tuner, TunerManager, detach
from restune_diffusion.tuners.configs import PartConfig

from .conftest import SDXL, make_unet, randomize

SIZE = 32
"""Image size in pixels; the features at the four levels of SD have sizes 4, 2, 1 and 1."""
PROMPTS = ["a red apple", "a boat at sea", "a small house"]
TEXT_WIDTH = 32

TUNERS: dict[str, PartConfig] = {
    "skip": SkipConfig(ratio=0.5),
    "bypass": BypassConfig(ratio=0.25),
    "res": ResConfig(self_attention="adapter", cross_attention="attention", feed_forward="adapter", width=4),
    "res inside attention": ResConfig(
        self_attention="prefix", cross_attention="prompt", feed_forward="lora", gate="exact", width=4
    ),
    "res on linear layers": ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=4),
}
"""Tuner configs that the tests run; a new part needs an entry here."""


def make_tuner(unet: nn.Module, kind: str = "skip", seed: int = 0) -> Tuner:
    """Return a tuner of one of `TUNERS` with random weights."""
    tuner = Tuner.for_base(unet, TUNERS[kind])
    randomize(tuner, seed)
    return tuner


def detach_all(unet: nn.Module) -> None:
    """Detach all tuners that a test left on a shared U-Net."""
    manager = TunerManager.of(unet)
    for name in manager.names if manager is not None else ():
        detach(unet, name)


def sd_unet(**changes: Any) -> UNet2DConditionModel:
    """Return the U-Net of the Stable Diffusion 1.5 pipelines, or a variant of it."""
    size = {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": TEXT_WIDTH, "sample_size": SIZE // 8}
    return make_unet(**{**size, **changes})


def sd_components() -> dict[str, Any]:
    """Return the components of Stable Diffusion 1.5 pipelines."""
    torch.manual_seed(0)
    return _with_controlnet(
        {
            "vae": _vae(),
            "text_encoder": _frozen(CLIPTextModel(_text_config())),
            "tokenizer": _tokenizer(),
            "unet": sd_unet(),
            "scheduler": _scheduler(),
            "safety_checker": None,
            "feature_extractor": _image_processor(),
            "image_encoder": _image_encoder(),
        }
    )


def sdxl_components() -> dict[str, Any]:
    """Return the components of Stable Diffusion XL pipelines."""
    torch.manual_seed(0)
    changes: dict[str, Any] = {
        "block_out_channels": (32, 32, 64),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 2, 4),
        "cross_attention_dim": 2 * TEXT_WIDTH,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
        "norm_num_groups": 8,
        "sample_size": SIZE // 8,
    }
    return _with_controlnet(
        {
            "vae": _vae(),
            "text_encoder": _frozen(CLIPTextModel(_text_config())),
            "text_encoder_2": _frozen(CLIPTextModelWithProjection(_text_config())),
            "tokenizer": _tokenizer(),
            "tokenizer_2": _tokenizer(),
            "unet": _frozen(UNet2DConditionModel(**{**SDXL, **changes})),
            "scheduler": _scheduler(),
            "feature_extractor": _image_processor(),
            "image_encoder": _image_encoder(),
        }
    )


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Return random images."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def masks(count: int) -> list[Image.Image]:
    """Return masks that cover the right half."""
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[:, SIZE // 2 :] = 255
    return [Image.fromarray(mask)] * count


@dataclass(frozen=True)
class Kind:
    """A pair of pipeline classes, ours and diffusers', with their arguments."""

    name: str
    inputs: Callable[[int], dict[str, Any]]
    """Function from a number of images to the arguments besides the prompts."""

    @property
    def is_xl(self) -> bool:
        return "XL" in self.name

    @property
    def ours(self) -> Any:
        return getattr(restune_diffusion, f"Restune{self.name}")

    @property
    def plain(self) -> Any:
        return getattr(diffusers, self.name)

    def make(self, pipeline_class: Any, components: dict[str, Any], **changes: Any) -> DiffusionPipeline:
        """Return a pipeline of one of the two classes, built from the components and changes that it accepts."""
        options = {"add_watermarker": False, "requires_safety_checker": False}
        taken = inspect.signature(pipeline_class).parameters
        chosen = {name: part for name, part in {**components, **options, **changes}.items() if name in taken}
        pipe = pipeline_class(**chosen)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _nothing(count: int) -> dict[str, Any]:
    return {"height": SIZE, "width": SIZE}


def _image(count: int) -> dict[str, Any]:
    return {"image": pictures(count), "strength": 1.0}


def _masked(count: int) -> dict[str, Any]:
    return {**_image(count), **_nothing(count), "mask_image": masks(count)}


def _control(count: int) -> dict[str, Any]:
    return {**_nothing(count), "image": pictures(count)}


KINDS = [
    Kind(f"StableDiffusion{size}{task}Pipeline", inputs)
    for size in ("", "XL")
    for task, inputs in {"": _nothing, "Img2Img": _image, "Inpaint": _masked, "ControlNet": _control}.items()
]
"""All public pipeline classes."""
PAG_KINDS = [Kind(f"StableDiffusion{size}PAGPipeline", _nothing) for size in ("", "XL")]
KINDS_BY_NAME = {kind.name: kind for kind in [*KINDS, *PAG_KINDS]}


def draw(pipe: Any, kind: Kind, count: int = 1, one_generator: bool = False, **changes: Any) -> Any:
    """Generate images with two steps from fixed noise, and return them in the pipeline's output type.

    Arguments that are None are omitted.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    arguments = {
        "prompt": PROMPTS[:count],
        "num_inference_steps": 2,
        "generator": generators[0] if one_generator else generators,
        "output_type": "latent",
        **kind.inputs(count),
        **changes,
    }
    output = pipe(**{name: value for name, value in arguments.items() if value is not None})
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


def untouched(unet: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, set[str]]]:
    """Assert that a model has no hooks; return its parameters and the attribute names of its modules."""
    for name, module in unet.named_modules():
        hooks = {key: value for key, value in vars(module).items() if key.endswith("_hooks") and value}
        assert not hooks, f"{name} has {hooks}"
    return (
        {name: tensor.clone() for name, tensor in unet.state_dict().items()},
        {name: set(vars(module)) for name, module in unet.named_modules()},
    )


def identical(one: Any, two: Any) -> bool:
    """Return whether two sets of images, of any of diffusers' output types, are bit-identical."""
    return np.array_equal(_numbers(one), _numbers(two))


def difference(one: Any, two: Any) -> float:
    """Return the largest difference between two sets of images."""
    return float(np.abs(_numbers(one).astype(float) - _numbers(two).astype(float)).max())


def _numbers(images: Any) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image) for image in images])


def _with_controlnet(components: dict[str, Any]) -> dict[str, Any]:
    """Return the components with a ControlNet whose output is nonzero: `from_unet` starts with zero convolutions."""
    controlnet = ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(8, 8, 8, 8))
    for convolution in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        nn.init.normal_(convolution.weight, std=0.1)
    nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.1)
    return {**components, "controlnet": _frozen(controlnet)}


_START, _END = "<|startoftext|>", "<|endoftext|>"
_LETTERS = [letter + end for letter in map(chr, range(ord("!"), ord("~") + 1)) for end in ("", "</w>")]
_VOCABULARY = {token: number for number, token in enumerate([*_LETTERS, _START, _END])}


def _tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer with a vocabulary of single letters, because copying the real one is slow."""
    # From files, because transformers 4 and 5 name the arguments of the class differently.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(_VOCABULARY))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=TEXT_WIDTH,
        vocab_size=len(_VOCABULARY),
        bos_token_id=_VOCABULARY[_START],
        eos_token_id=_VOCABULARY[_END],
        pad_token_id=_VOCABULARY[_END],
    )


def _vae() -> AutoencoderKL:
    widths = (8, 8, 8, 8)
    return _frozen(
        AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=SIZE,
            force_upcast=False,
        )
    )


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
    )
    return _frozen(CLIPVisionModelWithProjection(config))


def _image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size=SIZE, crop_size=SIZE)


def _frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)
