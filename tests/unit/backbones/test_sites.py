import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig

from restune_diffusion import BaseMismatchError, RestuneError, describe_base
from restune_diffusion.backbones import site_module

from ...conftest import SD15, SDXL, make_inputs, make_unet


def skip_widths(config):
    with torch.device("meta"):
        sites = describe_base(UNet2DConditionModel(**config)).sites
    return [site.channels for name, site in sites.items() if name.startswith("skip.")]


def test_sd15_has_twelve_skips_from_shallow_to_deep():
    assert skip_widths(SD15) == [320] * 4 + [640] * 3 + [1280] * 5


def test_sdxl_has_nine_skips():
    assert skip_widths(SDXL) == [320] * 4 + [640] * 3 + [1280] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": 1},
        {"layers_per_block": (1, 2, 1, 3)},
        {"resnet_time_scale_shift": "scale_shift", "class_embed_type": None},
        {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D") + ("DownBlock2D",) * 2},
        {"block_out_channels": (32, 64, 96, 128), "downsample_padding": 0},
        {"mid_block_type": None},
    ],
)
def test_the_described_sites_are_those_that_a_forward_pass_shows(changes):
    unet = make_unet(**changes)
    seen = {}

    def enter(number):
        def hook(module, args, kwargs):
            first = sum(len(block.resnets) for block in list(unet.up_blocks)[number + 1 :])
            for offset, skip in enumerate(kwargs["res_hidden_states_tuple"]):
                seen[f"skip.{first + offset}"] = skip.shape

        return hook

    for number, block in enumerate(unet.up_blocks):
        block.register_forward_pre_hook(enter(number), with_kwargs=True)
        block.register_forward_hook(lambda m, a, out, number=number: seen.update({f"up.{number}": out.shape}))
    if unet.mid_block is not None:
        unet.mid_block.register_forward_hook(lambda m, a, out: seen.update(mid=out.shape))
    unet.conv_norm_out.register_forward_pre_hook(lambda m, a: seen.update(out=a[0].shape))
    unet(*make_inputs())

    base = describe_base(unet)
    described = {name: base.sites[name] for name in base.stations}
    assert {name: site.channels for name, site in described.items()} == {name: s[1] for name, s in seen.items()}
    if changes.get("downsample_padding") is None:
        assert {name: 16 // site.stride for name, site in described.items()} == {n: s[2] for n, s in seen.items()}


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_every_transformer_block_is_described_as_it_is_built(config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    described = describe_base(unet).sites.items()
    sites = {name: site for name, site in described if site.operation in ("self", "cross", "ff", "block")}
    blocks = [module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
    assert len(sites) == 4 * len(blocks)
    assert len({id(site_module(unet, name)) for name in sites}) == len(sites)
    for name, site in sites.items():
        module = site_module(unet, name)
        linears = {path: layer for path, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
        if site.operation == "block":
            assert (module.attn1.to_q.in_features, module.attn1.heads) == (site.channels, site.heads)
        else:
            assert site.linears == {path: (layer.in_features, layer.out_features) for path, layer in linears.items()}
            assert all(site_module(unet, f"{name}.{path}") is layer for path, layer in linears.items())


@pytest.mark.parametrize("config", [SD15, SDXL, {**SD15, "use_linear_projection": True}], ids=["1.5", "xl", "2.1"])
def test_every_layer_outside_the_transformer_blocks_is_described_as_it_is_built(config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    expected = {
        layer: tuple(layer.weight.shape)
        for path, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and ".transformer_blocks." not in path
    }
    found = {}
    for name, site in describe_base(unet).sites.items():
        if site.operation in ("proj", "conv", "ends"):
            for path, shape in site.layers.items():
                layer = site_module(unet, f"{name}.{path}")
                found[layer] = (shape[1], shape[0])
                if isinstance(layer, torch.nn.Conv2d):
                    found[layer] += (shape.kernel, shape.kernel)
                    assert (shape.stride, shape.padding) == (layer.stride[0], layer.padding[0])
    assert found == expected


def test_a_loaded_lora_does_not_change_the_description(unet):
    plain = describe_base(unet)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "net.2", "proj_in", "conv1", "time_emb_proj"]))
    assert describe_base(unet) == plain


def test_a_model_without_skips_is_refused():
    vae = AutoencoderKL(block_out_channels=(32,))
    with pytest.raises(RestuneError, match=r"UNet2DConditionModel, .*, but this is a AutoencoderKL"):
        describe_base(vae)


def test_the_first_difference_is_named():
    ours, theirs = describe_base(make_unet()), describe_base(make_unet(cross_attention_dim=48))
    ours.narrowed([]).check_fits(describe_base(make_unet(seed=5, in_channels=9)))
    with pytest.raises(BaseMismatchError, match=r"cross_attention_dim = 32, but this base has .* = 48"):
        ours.check_fits(theirs)


def test_a_base_is_named_by_folder_or_hub_id_never_by_path(tmp_path):
    unet = make_unet()
    assert describe_base(unet).name == ""
    unet.save_pretrained(tmp_path / "my-base" / "unet")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "my-base" / "unet")
    assert describe_base(loaded).name == "my-base"
    loaded.register_to_config(_name_or_path="someone/checkpoint")
    assert describe_base(loaded).name == "someone/checkpoint"
