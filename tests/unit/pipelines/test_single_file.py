"""Checkpoints in one file: SD 1.x, 2.x, XL and inpainting load as the same models in a folder do."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from restune_diffusion import SkipConfig, Tuner, read_info, save_tuner
from restune_diffusion.backbones import describe_base
from restune_diffusion.conversion import describe_checkpoint
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.utils.errors import RestuneError

from ...conftest import randomize
from ...ldm_layout import write_single_file

VOCABULARY = 49408
WIDTHS = {"sd1": 32, "sd2": 128, "sdxl": 128}


def _text(width: int, act: str, model: Callable[..., Any], layers: int = 2) -> Any:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), hidden_act=act, projection_dim=width, bos_token_id=0, eos_token_id=2,
        pad_token_id=1,
    )  # fmt: skip
    return model(config).eval()


def models(family: str, *, inpainting: bool = False) -> dict[str, Any]:
    """Models with the exact structure of a family at small widths and random weights."""
    torch.manual_seed(0)
    channels = 9 if inpainting else 4
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4, norm_num_groups=32,
    )  # fmt: skip
    if family == "sdxl":
        parts = {
            "text_encoder": _text(32, "quick_gelu", CLIPTextModel),
            "text_encoder_2": _text(96, "gelu", CLIPTextModelWithProjection),
        }
        widths = (64, 64, 128)
        unet = UNet2DConditionModel(
            in_channels=channels, block_out_channels=widths, layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 2], attention_head_dim=[1, 1, 2], cross_attention_dim=128,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=6 * 32 + 96, sample_size=128,
        )  # fmt: skip
    else:
        act = "quick_gelu" if family == "sd1" else "gelu"
        width = 64
        parts = {"text_encoder": _text(width, act, CLIPTextModel)}
        widths = (32, 64, 64, 64) if family == "sd1" else (64, 64, 128, 128)
        unet = UNet2DConditionModel(
            in_channels=channels, block_out_channels=widths, layers_per_block=2, cross_attention_dim=width,
            attention_head_dim=8 if family == "sd1" else [max(1, each // 64) for each in widths],
            use_linear_projection=family == "sd2", sample_size=64,
        )  # fmt: skip
    randomize(unet, 1)
    return {"unet": unet.eval(), "vae": vae.eval(), **parts}


FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Path]]:
    folder = tmp_path_factory.mktemp("single")
    made = {}
    for family in FAMILIES:
        parts = models(family)
        made[family] = parts, write_single_file(folder / f"{family}.safetensors", family, parts)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_single_file_arrives(family, written):
    parts, path = written[family]
    pipeline = load_base(str(path), torch.float32)
    for name, part in parts.items():
        loaded = getattr(pipeline, name).state_dict()
        for key, value in part.state_dict().items():
            assert torch.equal(loaded[key], value), (name, key)
    unet, loaded = parts["unet"], pipeline.unet
    for key in ("block_out_channels", "attention_head_dim", "cross_attention_dim", "use_linear_projection"):
        assert list(_tuple(loaded.config[key])) == list(_tuple(unet.config[key])), key
    latents, states = torch.randn(1, 4, 16, 16), torch.randn(1, 77, unet.config.cross_attention_dim)
    more = {"added_cond_kwargs": {"text_embeds": torch.randn(1, 96), "time_ids": torch.randn(1, 6)}}
    more = more if family == "sdxl" else {}
    with torch.no_grad():
        given, found = unet(latents, 7, states, **more).sample, loaded(latents, 7, states, **more).sample
    torch.testing.assert_close(found, given, rtol=0, atol=1e-6)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_has_the_fingerprint_of_the_folder(family, written):
    parts, path = written[family]
    described = describe_checkpoint(str(path))
    assert described.sites == describe_base(parts["unet"]).sites


def test_the_published_sizes_follow_from_the_shapes(written):
    sd1, sdxl = load_base(str(written["sd1"][1]), torch.float32), load_base(str(written["sdxl"][1]), torch.float32)
    assert (sd1.unet.config.sample_size, sdxl.unet.config.sample_size) == (64, 128)
    assert (sd1.vae.config.scaling_factor, sdxl.vae.config.scaling_factor) == (0.18215, 0.13025)
    assert not sd1.vae.config.force_upcast
    assert sdxl.vae.config.force_upcast
    assert (sd1.tokenizer.pad_token, sdxl.tokenizer_2.pad_token) == ("<|endoftext|>", "!")


PREDICTIONS = {
    (): ("epsilon", False),
    ("v_pred",): ("v_prediction", False),
    ("v_pred", "ztsnr"): ("v_prediction", True),
    ("ztsnr",): ("epsilon", True),
}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("marks", PREDICTIONS)
def test_the_marks_of_other_programs_set_the_prediction(family, marks, written, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(load_file(written[family][1]) | {mark: torch.zeros(0) for mark in marks}, path)
    config = load_base(str(path), torch.float32).scheduler.config
    kind, zero = PREDICTIONS[marks]
    assert config.prediction_type == kind
    assert config.get("rescale_betas_zero_snr", False) is zero
    assert config.timestep_spacing == ("trailing" if zero else "leading")


@pytest.mark.parametrize(
    ("spread", "kind", "side"), [(0.2, "v_prediction", 96), (0.01, "epsilon", 64)], ids=["2.1-v", "2.1-base"]
)
def test_sd2_is_told_apart_by_its_statistics(spread, kind, side, written, tmp_path):
    path, tensors = tmp_path / "model.safetensors", load_file(written["sd2"][1])
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    tensors[name] = spread * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, path)
    pipeline = load_base(str(path), torch.float32)
    assert (pipeline.scheduler.config.prediction_type, pipeline.unet.config.sample_size) == (kind, side)


def test_declared_predictions_are_read_in_order(written, tmp_path):
    path, tensors = tmp_path / "model.safetensors", load_file(written["sd1"][1])
    save_file(tensors, path)
    path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert load_base(str(path), torch.float32).scheduler.config.prediction_type == "v_prediction"
    save_file(tensors, path, {"modelspec.prediction_type": "epsilon"})
    assert load_base(str(path), torch.float32).scheduler.config.prediction_type == "epsilon"
    save_file(tensors, path, {"modelspec.prediction_type": "flow"})
    with pytest.raises(RestuneError, match="predicts 'flow'; supported are epsilon and v-prediction"):
        load_base(str(path), torch.float32)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_inpainting_file_loads_as_inpainting(family, tmp_path):
    path = write_single_file(tmp_path / "model.safetensors", family, models(family, inpainting=True))
    pipeline = load_base(str(path), torch.float32)
    assert "Inpaint" in type(pipeline).__name__
    assert pipeline.unet.config.in_channels == 9


OTHERS = {
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 8)},
    "a LyCORIS file": {"lora_unet_mid_block_resnets_0_conv1.lokr_w1": (4, 4)},
    "a textual inversion embedding": {"emb_params": (1, 768)},
    "Flux": {"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (128,)},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (8,)},
    "the refiner of Stable Diffusion XL": {
        "conditioner.embedders.0.model.text_projection": (8, 8),
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    },
    "a ControlNet": {"control_model.time_embed.0.weight": (8, 8)},
    "a motion module of AnimateDiff": {"down_blocks.0.motion_modules.0.temporal_transformer.norm.bias": (8,)},
    "a VAE": {"decoder.conv_in.weight": (8, 4, 3, 3)},
    "a U-Net alone in diffusers' format": {"conv_in.weight": (8, 4, 3, 3)},
    "a text encoder": {"text_model.embeddings.position_embedding.weight": (77, 8)},
    "not a model known here": {"something": (1,)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_file_is_named_for_what_it_is(name, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in OTHERS[name].items()}, path)
    with pytest.raises(RestuneError) as caught:
        load_base(str(path), torch.float32)
    remedy = "give a Stable Diffusion 1.x, 2.x or XL checkpoint."
    assert str(caught.value) == f"The base {path} is {name}; {remedy}"


def test_a_checkpoint_without_a_part_names_the_part(written, tmp_path):
    path, tensors = tmp_path / "model.safetensors", load_file(written["sdxl"][1])
    for prefix, what in {
        "first_stage_model.": "lacks its VAE",
        "conditioner.embedders.1": "lacks the text encoder `conditioner.embedders.1.model`",
        "conditioner.": "a U-Net without its text encoder",
    }.items():
        save_file({name: value for name, value in tensors.items() if not name.startswith(prefix)}, path)
        with pytest.raises(RestuneError, match=what):
            load_base(str(path), torch.float32)


def test_missing_weights_are_refused(written, tmp_path):
    path, tensors = tmp_path / "model.safetensors", load_file(written["sd1"][1])
    for name in (
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
        "first_stage_model.decoder.norm_out.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ):
        save_file({key: value for key, value in tensors.items() if key != name}, path)
        with pytest.raises(RestuneError, match=r"missing; download the checkpoint again|lacks 1 weights"):
            load_base(str(path), torch.float32)


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"PK\x03\x04", "is not a safetensors file, or its header is damaged"), (b"", "header is damaged")],
)
def test_a_damaged_file_is_refused(content, what, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(RestuneError, match=what):
        load_base(str(path), torch.float32)


def test_a_cut_file_is_refused(written, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(written["sd1"][1].read_bytes()[:-100])
    with pytest.raises(RestuneError, match=r"is cut off: it has .* download it again"):
        load_base(str(path), torch.float32)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_refused_unread(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch gone'\ntR.")
    with pytest.raises(RestuneError, match="can run code when it is read"):
        load_base(str(path), torch.float32)


def test_a_tuner_for_another_prediction_type_warns(written, tmp_path):
    pipeline = load_base(str(written["sd1"][1]), torch.float32)
    tuner = Tuner.for_base(pipeline.unet, SkipConfig())
    for kind in ("v_prediction", "epsilon"):
        path = tmp_path / f"{kind}.safetensors"
        save_tuner(tuner, path, metadata={"restune.training": json.dumps({"prediction_type": kind})})
    with pytest.warns(UserWarning, match="was trained on a base with v_prediction, but this base has epsilon"):
        pipeline.load_tuner_weights(tmp_path / "v_prediction.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_tuner_weights(tmp_path / "epsilon.safetensors")


@pytest.mark.parametrize(("family", "marks"), [("sd1", ()), ("sdxl", ("v_pred", "ztsnr"))])
def test_a_tuner_is_trained_on_a_single_file_and_used_on_it(family, marks, written, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(load_file(written[family][1]) | {mark: torch.zeros(0) for mark in marks}, path)
    (tmp_path / "data").mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 9, 9)).save(tmp_path / "data" / f"{number}.png")
    result = train(
        TrainConfig(
            base=str(path), data=tmp_path / "data", output=tmp_path / "out", name="ink", prompt="a square", steps=2,
            batch_size=1, resolution=64, learning_rate=1e-2, log_with="none",
        ),
        verbose=False,
    )  # fmt: skip
    assert read_info(result.path).training["prediction_type"] == ("v_prediction" if marks else "epsilon")
    pipeline = load_base(str(path), torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def image() -> Any:
        generator = torch.Generator().manual_seed(0)
        made = pipeline("a square", num_inference_steps=2, width=64, height=64, generator=generator, output_type="np")
        return made.images

    before = image()
    pipeline.load_tuner_weights(result.path, "ink")
    assert abs(image() - before).max() > 0
    pipeline.unload_tuner_weights()
    assert (image() == before).all()
