"""Names of LoRA layers in files of other programs, of the U-Net and of the text encoders."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from restune_diffusion import (
    ResConfig,
    TextConfig,
    Tuner,
    attach,
    describe_base,
    load_tuner,
    save_tuner,
    text_encoders,
)
from restune_diffusion.backbones import describe_text
from restune_diffusion.conversion import describe_checkpoint, export_tuner, import_tuner
from restune_diffusion.conversion.names import sgm_path

from ...conftest import TINY_BASE, make_unet, randomize
from .test_lora import ATTENTION, assert_same_tensors, linear_modules

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYER = "text_encoder.text_model.encoder.layers.0.self_attn"
ENCODER = "lora_te_text_model_encoder_layers_0_self_attn"


@pytest.fixture(scope="module")
def tiny():
    return describe_checkpoint(str(TINY_BASE))


def test_a_checkpoint_describes_its_text_encoders(tiny, components):
    pipe = StableDiffusionPipeline(**components, requires_safety_checker=False)
    assert tiny.text == describe_text(text_encoders(pipe))


def lora_file(pipe, tmp_path):
    """A LoRA of U-Net and text encoder that diffusers saved."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipe.unet.add_adapter(
            LoraConfig(r=2, lora_alpha=1, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
        )
        pipe.text_encoder.add_adapter(
            LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "out_proj", "fc1"], init_lora_weights=False)
        )
    metadata = {}
    for component in ("unet", "text_encoder"):
        settings = getattr(pipe, component).peft_config["default"].to_dict()
        metadata[f"{component}_lora_adapter_metadata"] = {
            key: list(value) if isinstance(value, set) else value for key, value in settings.items()
        }
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        **metadata,
    )


def outputs(pipe) -> tuple[torch.Tensor, torch.Tensor]:
    text = pipe.encode_prompt("a fox", "cpu", 1, False)[0]
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    latent = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return text.detach(), pipe.unet(latent, torch.tensor(321), text).sample


def test_text_encoders_and_the_unet_act_as_in_diffusers_and_come_back(tiny, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(str(TINY_BASE))
    plain = outputs(pipe)
    lora_file(pipe, tmp_path)
    expected = outputs(pipe)
    assert all((one - two).abs().max() > 0.01 for one, two in zip(plain, expected, strict=True))
    tuner = import_tuner(tmp_path, tiny)
    assert [config.part for config in tuner.configs] == ["res", "text"]
    save_tuner(tuner, tmp_path / "ours.safetensors")
    for name in ("ours", "diffusers", "kohya"):
        if name == "ours":
            again = load_tuner(tmp_path / "ours.safetensors")
        else:
            export_tuner(load_tuner(tmp_path / "ours.safetensors"), tmp_path / f"{name}.safetensors", name)
            again = import_tuner(tmp_path / f"{name}.safetensors", tiny)
        fresh = StableDiffusionPipeline.from_pretrained(str(TINY_BASE))
        with attach(fresh.unet, again, text=text_encoders(fresh)):
            ours = outputs(fresh)
        for one, two in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
        if name != "ours":
            fresh.load_lora_weights(tmp_path / f"{name}.safetensors")
            for one, two in zip(outputs(fresh), expected, strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    before, after = (load_file(tmp_path / name) for name in ("pytorch_lora_weights.safetensors",
                                                             "diffusers.safetensors"))  # fmt: skip
    # diffusers 0.42.1 with transformers 5 may leave out `text_model`.
    before = {key.replace("text_encoder.encoder", "text_encoder.text_model.encoder"): before[key] for key in before}
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def dotted(module: str, down: str, up: str) -> tuple[str, str]:
    return f"{module}.{down}", f"{module}.{up}"


UNET = {
    "kohya, A1111, OneTrainer": dotted(f"lora_unet_{BLOCK}.to_q".replace(".", "_"), "lora_down.weight",
                                       "lora_up.weight"),
    "kohya, original names": dotted(f"lora_unet_{sgm_path(BLOCK, 2)}.to_q".replace(".", "_").replace("__", "_"),
                                    "lora_down.weight", "lora_up.weight"),
    "LyCORIS, SimpleTuner": dotted(f"lycoris_{BLOCK}.to_q".replace(".", "_"), "lora_down.weight", "lora_up.weight"),
    "ComfyUI": dotted(f"diffusion_model.{sgm_path(BLOCK, 2)}.to_q", "lora_down.weight", "lora_up.weight"),
    "ComfyUI, PEFT names": dotted(f"diffusion_model.{sgm_path(BLOCK, 2)}.to_q", "lora_A.weight", "lora_B.weight"),
    "OneTrainer, OMI": dotted(f"unet.{BLOCK}.to_q", "lora_down.weight", "lora_up.weight"),
    "diffusers, SimpleTuner, ai-toolkit": dotted(f"unet.{BLOCK}.to_q", "lora_A.weight", "lora_B.weight"),
    "diffusers, adapter name": dotted(f"unet.{BLOCK}.to_q", "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers before PEFT": dotted(f"unet.{BLOCK}.to_q", "lora.down.weight", "lora.up.weight"),
    "diffusers, processors": dotted(f"unet.{BLOCK}.processor", "to_q_lora.down.weight", "to_q_lora.up.weight"),
    "diffusers, processors alone": dotted(f"{BLOCK}.processor", "to_q_lora.down.weight", "to_q_lora.up.weight"),
    "PEFT": dotted(f"base_model.model.{BLOCK}.to_q", "lora_A.weight", "lora_B.weight"),
    "SCEPTER": dotted(f"model.{sgm_path(BLOCK, 2)}.to_q", "lora_A.0_SwiftLoRA.weight", "lora_B.0_SwiftLoRA.weight"),
}  # fmt: skip
TEXT = {
    "kohya": dotted(f"{ENCODER}_q_proj", "lora_down.weight", "lora_up.weight"),
    "kohya, SDXL": dotted(f"{ENCODER}_q_proj".replace("lora_te_", "lora_te1_"), "lora_down.weight", "lora_up.weight"),
    "diffusers": dotted(f"{LAYER}.q_proj", "lora_A.weight", "lora_B.weight"),
    "diffusers, transformers 5": dotted(f"{LAYER}.q_proj".replace("text_model.", ""), "lora_A.weight",
                                        "lora_B.weight"),
    "diffusers before PEFT": dotted(f"{LAYER}.q_proj", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "diffusers, older": dotted(LAYER, "to_q_lora.down.weight", "to_q_lora.up.weight"),
    "ComfyUI": dotted(f"{LAYER}.q_proj".replace("text_encoder.", "text_encoders.clip_l.transformer."),
                      "lora_down.weight", "lora_up.weight"),
    "OMI": dotted(f"{LAYER}.q_proj".replace("text_encoder.", "clip_l."), "lora_down.weight", "lora_up.weight"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "keys"), [
    *(pytest.param("res", keys, id=f"unet, {name}") for name, keys in UNET.items()),
    *(pytest.param("text", keys, id=f"text, {name}") for name, keys in TEXT.items()),
])  # fmt: skip
def test_every_name_of_a_layer_is_read(tiny, tmp_path, kind, keys):
    base = tiny.model_copy(update={"sites": describe_base(make_unet()).sites,
                                   "structure": describe_base(make_unet()).structure})  # fmt: skip
    site = "down.0.attn.0.block.0.self.to_q" if kind == "res" else "text_encoder.layers.0.self_attn.q_proj"
    inputs, outputs_ = (32, 32) if kind == "res" else base.text["text_encoder"].linears["self_attn.q_proj"]
    down, up = torch.randn(2, inputs), torch.randn(outputs_, 2)
    save_file({keys[0]: down, keys[1]: up}, tmp_path / "in.safetensors")
    state = import_tuner(tmp_path / "in.safetensors", base).state_dict()
    assert torch.equal(state[f"{kind}.{site}.lora.down.weight"], down)
    assert torch.equal(state[f"{kind}.{site}.lora.up.weight"], up)


def test_files_for_xl_number_the_text_encoders(tmp_path, components):
    unet = make_unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1,
                     up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(32, 64))  # fmt: skip
    pipe = StableDiffusionPipeline(**components, requires_safety_checker=False)
    (encoder,) = text_encoders(pipe).values()
    configs = (ResConfig(self_attention="lora", feed_forward=None, width=2), TextConfig(rank=2, linears=("mlp.fc1",)))
    tuner = Tuner.for_base(unet, *configs, text={"text_encoder": encoder, "text_encoder_2": encoder})
    randomize(tuner)
    export_tuner(tuner, tmp_path / "out.safetensors", "kohya")
    names = {key.split(".")[0] for key in load_file(tmp_path / "out.safetensors")}
    assert {"lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1",
            "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"} <= names  # fmt: skip
    again = import_tuner(tmp_path / "out.safetensors", tuner.base).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in tuner.state_dict().items())


@pytest.mark.parametrize("form", ["lora.down", "processor"])
def test_older_layouts_of_diffusers(unet, tmp_path, form):
    tensors, base = {}, describe_base(unet)
    for module in linear_modules(unet, ATTENTION):
        attention, linear = module.split(".to_")
        for half, suffix in (("down", "A"), ("up", "B")):
            name = f"unet.{module}.lora.{half}.weight"
            if form == "processor":
                name = f"{attention}.processor.to_{linear.removesuffix('.0')}_lora.{half}.weight"
            layer = unet.get_submodule(module)
            shape = (4, layer.in_features) if half == "down" else (layer.out_features, 4)
            tensors[name] = torch.randn(shape, generator=torch.Generator().manual_seed(len(tensors))) * 0.3
            tensors[f"new unet.{module}.lora_{suffix}.weight"] = tensors[name]
    new = {key[4:]: tensors.pop(key).clone() for key in list(tensors) if key.startswith("new ")}
    save_file(tensors, tmp_path / "old.safetensors")
    save_file(new, tmp_path / "new.safetensors")
    export_tuner(import_tuner(tmp_path / "old.safetensors", base), tmp_path / "out.safetensors", "diffusers")
    assert_same_tensors(tmp_path / "new.safetensors", tmp_path / "out.safetensors")
