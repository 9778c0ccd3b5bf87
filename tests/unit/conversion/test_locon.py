"""LoRA outside the transformer blocks: what kohya's trainer and LoCon tune, against diffusers, LyCORIS and PEFT."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from restune_diffusion import Tuner, TunerFileError, attach, describe_base, load_tuner, save_tuner
from restune_diffusion.backbones import module_path
from restune_diffusion.conversion import export_tuner, import_tuner
from restune_diffusion.conversion.arithmetic import merge_tuners, reduce_rank
from restune_diffusion.conversion.products.reduction import Reduction

from ...conftest import make_inputs, make_unet
from .test_lora import assert_same_tensors
from .test_lycoris import fill, weights_of

SD15: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
}
SD21 = {**SD15, "use_linear_projection": True}
XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 16, 32),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
# Modules of the U-Net whose layers the trainers tune.
KOHYA = ("Transformer2DModel",)
LOCON = (*KOHYA, "ResnetBlock2D", "Downsample2D", "Upsample2D")
FULL = (*LOCON, "UNet2DConditionModel", "TimestepEmbedding")


def output(unet: torch.nn.Module, tuner: Tuner | None = None, batch: int = 1) -> torch.Tensor:
    added = {"text_embeds": torch.linspace(-1, 1, 16)[None], "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]])}
    added = {key: value.repeat(batch, 1) for key, value in added.items()}
    with torch.no_grad(), contextlib.nullcontext() if tuner is None else attach(unet, tuner):
        return unet(*make_inputs(batch=batch), added_cond_kwargs=added).sample


def layers(unet: UNet2DConditionModel, kinds: tuple[str, ...]) -> dict[str, torch.nn.Module]:
    """Linear layers and convolutions of the modules of some classes, by path."""
    found = {}
    for path, module in unet.named_modules():
        if type(module).__name__ in kinds:
            # Of the U-Net itself only its own layers.
            inner = module.named_children() if module is unet else module.named_modules()
            found |= {
                f"{path}.{name}".lstrip("."): layer
                for name, layer in inner
                if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
            }
    return found


def sgm_name(path: str) -> str:
    """Name in the original U-Net of SDXL, for two layers a block."""
    *steps, last = path.split(".")
    last = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
            "conv_shortcut": "skip_connection"}.get(last, last)  # fmt: skip
    if steps[:1] == ["mid_block"]:
        where = "middle_block_1" if steps[1] == "attentions" else f"middle_block_{2 * int(steps[2])}"
    elif len(steps) < 4:
        return {"conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding.linear_1": "time_embed_0",
                "time_embedding.linear_2": "time_embed_2", "add_embedding.linear_1": "label_emb_0_0",
                "add_embedding.linear_2": "label_emb_0_2"}[path]  # fmt: skip
    elif steps[2] == "downsamplers":
        return f"input_blocks_{3 * int(steps[1]) + 3}_0_op"
    elif steps[2] == "upsamplers":
        return f"output_blocks_{3 * int(steps[1]) + 2}_2_conv"
    else:
        number = 3 * int(steps[1]) + int(steps[3])
        side = f"input_blocks_{number + 1}" if steps[0] == "down_blocks" else f"output_blocks_{number}"
        where = f"{side}_{int(steps[2] == 'attentions')}"
        steps = steps[1:]
    return "_".join([where, *steps[3:], last])


def kohya_file(
    unet: UNet2DConditionModel, file: Path, kinds: tuple[str, ...], conv_dim: int = 2, dtype=torch.float32
) -> dict[str, torch.nn.Module]:
    """Write a LoRA as sd-scripts does, with rank 4 and alpha 2, and for larger kernels `conv_dim` and alpha 1."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    xl, chosen = unet.config.addition_embed_type is not None, layers(unet, kinds)
    names = {}
    for path, layer in chosen.items():
        name = f"lora_unet_{sgm_name(path) if xl else path.replace('.', '_')}"
        names[name] = path
        outputs, *inside = layer.weight.shape
        large = len(inside) > 1 and inside[1] > 1
        rank, alpha = (conv_dim, 1.0) if large else (4, 2.0)
        ones = [1] * len(inside[1:])
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(rank, *inside, generator=generator) * 0.1,
            f"{name}.lora_up.weight": torch.randn(outputs, rank, *ones, generator=generator) * 0.1,
            f"{name}.alpha": torch.tensor(alpha),
        }
    save_file({key: value.to(dtype) for key, value in tensors.items()}, file)
    return names


def in_diffusers(unet: UNet2DConditionModel, file: Path) -> torch.Tensor:
    kind = StableDiffusionPipeline if unet.config.addition_embed_type is None else StableDiffusionXLPipeline
    state, alphas, metadata = kind.lora_state_dict(str(file), unet_config=unet.config, return_lora_metadata=True)
    kind.load_lora_into_unet(state, alphas, unet, adapter_name="a", metadata=metadata)
    result = output(unet)
    unet.delete_adapters("a")
    return result


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        pytest.param(SD15, KOHYA, id="1.5, kohya"),
        pytest.param(SD21, KOHYA, id="2.1, kohya"),
        pytest.param(XL, KOHYA, id="xl, kohya"),
        pytest.param(SD15, LOCON, id="1.5, locon"),
        pytest.param(SD15, FULL, id="1.5, all"),
        pytest.param(XL, FULL, id="xl, all"),
    ],
)
def test_a_kohya_file_acts_as_in_diffusers_and_comes_back_bit_for_bit(tmp_path, config, kinds):
    unet = make_unet(**config)
    names = kohya_file(unet, tmp_path / "in.safetensors", kinds)
    plain, expected = output(unet), in_diffusers(make_unet(**config), tmp_path / "in.safetensors")
    assert (plain - expected).abs().max() > 0.01
    tuner = import_tuner(tmp_path / "in.safetensors", describe_base(unet))
    assert {module_path(site) for site in next(tuner.parts()).loras()} == set(names.values())
    torch.testing.assert_close(output(unet, tuner), expected, rtol=0, atol=1e-5)
    assert torch.equal(output(unet), plain)
    save_tuner(tuner, tmp_path / "ours.safetensors")
    loaded = load_tuner(tmp_path / "ours.safetensors")
    torch.testing.assert_close(output(unet, loaded), expected, rtol=0, atol=1e-5)
    export_tuner(loaded, tmp_path / "kohya.safetensors", "kohya")
    assert_same_tensors(tmp_path / "in.safetensors", tmp_path / "kohya.safetensors")
    export_tuner(loaded, tmp_path / "diffusers.safetensors", "diffusers")
    torch.testing.assert_close(
        in_diffusers(make_unet(**config), tmp_path / "diffusers.safetensors"), expected, rtol=0, atol=1e-5
    )


SMALL = {**SD15, "layers_per_block": 1}
LYCORIS = {
    "locon": {"algo": "lora"},
    "locon, tucker": {"algo": "lora", "use_tucker": True},
    "loha": {"algo": "loha"},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, tucker": {"algo": "lokr", "factor": 4, "use_tucker": True},
    "lokr, matrices": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "full": {"algo": "full"},
    "dora": {"algo": "lora", "dora_wd": True},
    "dora by inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "doha, tucker": {"algo": "loha", "dora_wd": True, "use_tucker": True},
}


@pytest.mark.parametrize("settings", LYCORIS.values(), ids=LYCORIS)
def test_layers_of_lycoris_act_as_in_lycoris(tmp_path, settings):
    lycoris = pytest.importorskip("lycoris")
    unet, tuned = make_unet(**SMALL), make_unet(**SMALL)
    outside = ["ResnetBlock2D", "Downsample2D", "Upsample2D"]
    names = ["conv_in", "conv_out", r".*\.proj_in", r".*\.proj_out"]
    lycoris.LycorisNetwork.apply_preset({"target_module": outside, "target_name": names})
    sizes = {"linear_dim": 2, "linear_alpha": 2.0, "conv_dim": 3, "conv_alpha": 1.5}
    network = lycoris.create_lycoris(tuned, 1.0, **sizes, **settings)
    network.apply_to()
    fill(network, ("lora_", "hada_", "lokr_", "weight"), 0.15)
    state = {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}
    expected = output(tuned)
    assert (output(unet) - expected).abs().max() > 0.01
    save_file(state, tmp_path / "in.safetensors")
    tuner = import_tuner(tmp_path / "in.safetensors", describe_base(unet), base_weights=weights_of(unet))
    tuned_paths = {module_path(site) for site in next(tuner.parts()).loras()}
    assert {"conv_in", "down_blocks.0.downsamplers.0.conv", "mid_block.attentions.0.proj_in",
            "up_blocks.1.resnets.0.conv_shortcut", "mid_block.resnets.1.time_emb_proj"} <= tuned_paths  # fmt: skip
    torch.testing.assert_close(output(unet, tuner), expected, rtol=0, atol=1e-5)


TARGETS = ["conv1", "conv_shortcut", "proj_out", "downsamplers.0.conv", "time_emb_proj"]
PEFT = {
    "lora": LoraConfig(r=3, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False),
    "loha": LoHaConfig(r=3, alpha=2, target_modules=TARGETS, init_weights=False),
    "loha, tucker": LoHaConfig(r=3, alpha=2, target_modules=TARGETS, init_weights=False, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=3, alpha=2, target_modules=TARGETS, init_weights=False, decompose_factor=4),
    "lokr, tucker": LoKrConfig(r=3, alpha=2, target_modules=TARGETS, init_weights=False, decompose_factor=4,
                               use_effective_conv2d=True),
    "dora": LoraConfig(r=3, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
}  # fmt: skip


@pytest.mark.parametrize("config", PEFT.values(), ids=PEFT)
def test_layers_of_peft_act_as_in_peft(tmp_path, config):
    unet = make_unet(**SMALL)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tuned = get_peft_model(make_unet(**SMALL), config)
    assert isinstance(tuned, PeftModel)
    fill(tuned, ("lora_A", "lora_B", "hada_", "lokr_"), 0.3)
    tuned.save_pretrained(tmp_path)
    expected = output(tuned)
    assert (output(unet) - expected).abs().max() > 0.01
    tuner = import_tuner(tmp_path, describe_base(unet), base_weights=weights_of(unet))
    torch.testing.assert_close(output(unet, tuner), expected, rtol=0, atol=1e-5)


SITES = {
    "down.0.attn.0.proj_in": ("down_blocks.0.attentions.0.proj_in", "input_blocks.1.1.proj_in"),
    "mid.attn.0.proj_out": ("mid_block.attentions.0.proj_out", "middle_block.1.proj_out"),
    "up.1.resnet.2.conv_shortcut": ("up_blocks.1.resnets.2.conv_shortcut", "output_blocks.5.0.skip_connection"),
    "down.1.resnet.0.conv1": ("down_blocks.1.resnets.0.conv1", "input_blocks.4.0.in_layers.2"),
    "mid.resnet.1.time_emb_proj": ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
    "down.0.downsample.conv": ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
    # Of a block without attention.
    "up.0.upsample.conv": ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
    "stem.conv_in": ("conv_in", "input_blocks.0.0"),
    "time.linear_2": ("time_embedding.linear_2", "time_embed.2"),
}
FORMS = {
    "kohya": ("lora_unet_{}", "lora_down.weight", "lora_up.weight"),
    "LyCORIS": ("lycoris_{}", "lora_down.weight", "lora_up.weight"),
    "ComfyUI": ("diffusion_model.{}", "lora_down.weight", "lora_up.weight"),
    "OneTrainer, OMI": ("unet.{}", "lora_down.weight", "lora_up.weight"),
    "diffusers": ("unet.{}", "lora_A.weight", "lora_B.weight"),
    "diffusers before PEFT": ("unet.{}", "lora.down.weight", "lora.up.weight"),
    "PEFT": ("base_model.model.{}", "lora_A.weight", "lora_B.weight"),
}


@pytest.mark.parametrize(("form", "down_key", "up_key"), FORMS.values(), ids=FORMS)
def test_every_name_of_a_layer_is_read(tmp_path, form, down_key, up_key):
    unet = make_unet(**SD15)
    base = describe_base(unet)
    for which in (0, 1):
        tensors, expected = {}, {}
        for site, paths in SITES.items():
            shape = unet.get_submodule(module_path(site)).weight.shape
            name = form.format(paths[which].replace(".", "_") if "_{}" in form else paths[which])
            down, up = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, *[1] * len(shape[2:]))
            tensors |= {f"{name}.{down_key}": down, f"{name}.{up_key}": up}
            expected |= {f"res.{site}.lora.down.weight": down, f"res.{site}.lora.up.weight": up}
        save_file(tensors, tmp_path / "in.safetensors")
        state = import_tuner(tmp_path / "in.safetensors", base).state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_of_a_locon_come_back_bit_for_bit(tmp_path, dtype):
    unet = make_unet(**SMALL)
    kohya_file(unet, tmp_path / "in.safetensors", LOCON, dtype=dtype)
    tuner = import_tuner(tmp_path / "in.safetensors", describe_base(unet))
    assert tuner.dtype == dtype
    config = tuner.configs[0]
    assert (config.width, config.alpha, config.conv_width, config.conv_alpha) == (4, 2.0, 2, 1.0)
    assert config.sites == ("*",)
    export_tuner(tuner, tmp_path / "out.safetensors", "kohya")
    assert_same_tensors(tmp_path / "in.safetensors", tmp_path / "out.safetensors")


def test_a_rank_or_an_energy_limits_a_convolution(tmp_path):
    unet = make_unet(**SMALL)
    weight = torch.randn(32, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    save_file({"lora_unet_down_blocks_0_resnets_0_conv1.diff": weight}, tmp_path / "in.safetensors")
    values = torch.linalg.svdvals(weight.flatten(1).double())
    shares = values.square().cumsum(0) / values.square().sum()
    for limit, rank in ((Reduction(), 32), (Reduction(5), 5), (Reduction(energy=0.8), int((shares < 0.8).sum()) + 1)):
        tuner = import_tuner(tmp_path / "in.safetensors", describe_base(unet), reduction=limit)
        (lora,) = next(tuner.parts()).loras().values()
        assert lora.down.weight.shape == (rank, 32, 3, 3)
        lost = float((lora.delta() - weight).square().sum() / weight.square().sum())
        assert lost == pytest.approx(1 - float(shares[rank - 1]), abs=1e-5)
        assert limit.kept == pytest.approx(float(shares[rank - 1]), abs=1e-5) or rank == 32


NAME = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"lora_down.weight": (2, 32, 5, 5), "lora_up.weight": (32, 2, 1, 1)},
            "has another kernel, but this base",
        ),
        (
            {"lora_down.weight": (2, 32, 1, 1), "lora_up.weight": (32, 2, 1, 1)},
            "kernel of 3x3, but the file",
        ),
        ({"lora_down.weight": (2, 32), "lora_up.weight": (31, 2)}, "is for another base: at down.0.resnet.0.conv1"),
        (
            {"lora_down.weight": (2, 32, 1, 1), "lora_up.weight": (32, 2, 1, 1), "lora_mid.weight": (2, 2, 5, 5)},
            "is LoCon with a middle convolution, but this base has a convolution of 3x3 there",
        ),
        (
            {"lora_down.weight": (2, 32, 1, 1), "lora_up.weight": (32, 2, 1, 1), "lora_mid.weight": (2, 3, 3, 3)},
            "its tensors .* do not fit together",
        ),
        ({"lora_down.weight": (3, 32, 3, 3), "lora_up.weight": (32, 2, 1, 1)}, "do not fit together"),
        (
            {"lora_down.weight": (0, 32), "lora_up.weight": (32, 0), "lora_mid.weight": (0, 0, 3, 3), "alpha": ()},
            "do not fit together",
        ),
        ({"diff": (32, 32, 5, 5)}, "has another kernel, but this base has a convolution of 3x3 there"),
        ({"diff": (32, 32, 3, 3), "dora_scale": (1, 31, 1, 1)}, r"its magnitude has the shape \(1, 31, 1, 1\)"),
    ],
)
def test_a_convolution_that_does_not_fit_is_named(tmp_path, tensors, message):
    unet = make_unet(**SMALL)
    save_file({f"{NAME}.{name}": torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "in.safetensors")
    with pytest.raises(TunerFileError, match=message):
        import_tuner(tmp_path / "in.safetensors", describe_base(unet), base_weights=weights_of(unet))


def test_the_sum_of_two_files_acts_as_both(tmp_path):
    unet = make_unet(**SMALL)
    base = describe_base(unet)
    kohya_file(unet, tmp_path / "one.safetensors", LOCON)
    kohya_file(unet, tmp_path / "two.safetensors", KOHYA)
    one, two = (import_tuner(tmp_path / f"{name}.safetensors", base) for name in ("one", "two"))
    both = merge_tuners([one, two], [0.5, -1.0], "add")
    config = both.configs[0]
    assert (config.width, config.conv_width) == (8, 2)
    with torch.no_grad(), attach(unet, one, "one", weight=0.5), attach(unet, two, "two", weight=-1.0):
        expected = output(unet)
    torch.testing.assert_close(output(unet, both), expected, rtol=0, atol=1e-5)
    smaller, kept = reduce_rank(one, 1)
    assert {lora.down.weight.shape[0] for lora in next(smaller.parts()).loras().values()} == {1}
    assert 0 < kept < 1
