from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from restune_diffusion import TunerFileError, describe_base
from restune_diffusion.conversion import import_tuner
from restune_diffusion.tuners import Features

from ...conftest import SD15, SDXL, make_unet, randomize
from .swift_files import sce_adapter, skip_channels

STRIDES = [1, 1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1]
"""Of SCEPTER's U-Net for SD 1.5: where its encoder halves the resolution, shallow to deep."""


class Published(nn.Module):
    """SCEPTER's `CSCTuners`, from its source: the modules with tensors under their names there."""

    def __init__(self, channels: list[int], kernel: int, stem: float = 1, out: int = 256) -> None:
        super().__init__()
        one, two, six = (int(width * stem) for width in (16, 32, 96))
        widths = [
            (3, one, 1),
            (one, one, 1),
            (one, two, 2),
            (two, two, 1),
            (two, six, 2),
            (six, six, 1),
            (six, out, 2),
        ]
        layers: list[nn.Module] = []
        for inputs, outputs, stride in widths:
            layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.SiLU()]
        self.pre_hint_blocks = nn.Sequential(*layers[:-1])
        previous, blocks = out, []
        for width, stride in zip(channels, STRIDES, strict=False):
            convolution = nn.Conv2d(previous, width, kernel, stride=stride, padding=kernel // 2)
            blocks.append(nn.Sequential(nn.SiLU(), convolution))
            previous = width
        self.dense_hint_blocks = nn.ModuleList(blocks)

    def hints(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Features for each skip connection, shallow to deep."""
        hint, hints = self.pre_hint_blocks(image), []
        for block in self.dense_hint_blocks:
            hint = block(hint)
            hints.append(hint)
        return hints


@pytest.fixture
def base(unet):
    return describe_base(unet)


def published(base, kernel=3, ratio=1.0, seed=0, stem=1.0, out=256):
    module = Published(list(reversed(skip_channels(base))), kernel, stem, out)
    randomize(module, seed, std=0.05)
    tensors = dict(module.state_dict())
    generator = torch.Generator().manual_seed(seed + 5)
    for number, channels in enumerate(skip_channels(base)):
        for name, value in sce_adapter(channels, int(channels * ratio), generator, torch.float32).items():
            tensors[f"lsc_tuner_blocks.{number}.tuner_op.{name}"] = value
    return module, tensors


# A U-Net with the blocks of SDXL, and the stem of SCEPTER's `sdxl_1024_sce_ctr_*.yaml`.
XL = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
      "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
      "block_out_channels": (32, 64, 96)}  # fmt: skip


@pytest.mark.parametrize(
    ("blocks", "prefix", "kernel", "ratio", "stem"),
    [
        ({}, "0.", 3, 1.0, {}),
        ({}, "model.control_blocks.0.", 1, 0.5, {}),
        ({}, "", 3, 1.0, {"stem": 0.5, "out": 128}),
        (XL, "0.", 3, 1.0, {"stem": 2.0, "out": 320}),
    ],
)
def test_a_csc_tuner_of_scepter_computes_here_what_it_computes_there(tmp_path, blocks, prefix, kernel, ratio, stem):
    base = describe_base(make_unet(**blocks))
    deepest = len(base.skips) - 1
    module, tensors = published(base, kernel, ratio, **stem)
    save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "in.safetensors")
    tuner = import_tuner(tmp_path / "in.safetensors", base)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    # In float64, as the random cascade makes large numbers.
    (part,), module, image = tuner.double().parts(), module.double(), image.double()
    tensors = {key: value.double() for key, value in tensors.items()}
    with torch.no_grad():
        hints, features = module.hints(image), Features(conditions=part.encode([image], (8, 8)))
        for depth, hint in enumerate(hints):
            x = torch.randn(hint.shape, generator=torch.Generator().manual_seed(depth), dtype=torch.float64)
            op = {name: tensors[f"lsc_tuner_blocks.{deepest - depth}.tuner_op.{name}"]
                  for name in ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")}  # fmt: skip
            rows = (x + hint).permute(0, 2, 3, 1)
            hidden = F.gelu(F.linear(rows, op["ln1.weight"], op["ln1.bias"]))
            expected = F.linear(hidden, op["ln2.weight"], op["ln2.bias"]).permute(0, 3, 1, 2) + hint
            torch.testing.assert_close(part(f"skip.{depth}", x, features), expected, rtol=1e-10, atol=1e-12)


def test_several_conditions_in_one_file(base, tmp_path):
    tensors = {}
    for number in range(2):
        tensors |= {f"{number}.{key}": value for key, value in published(base, seed=number)[1].items()}
    save_file(tensors, tmp_path / "in.safetensors")
    tuner = import_tuner(tmp_path / "in.safetensors", base)
    (config,) = tuner.configs
    assert config.conditions == ("condition", "condition1")
    state = tuner.state_dict()
    assert torch.equal(state["control.encoders.1.stem.6.weight"], tensors["1.pre_hint_blocks.12.weight"])
    assert torch.equal(state["control.skip.0.1.up.weight"], tensors["1.lsc_tuner_blocks.11.tuner_op.ln2.weight"])


def test_a_csc_tuner_that_does_not_fit_is_refused_by_name(base, tmp_path):
    _, tensors = published(base)
    path = tmp_path / "in.safetensors"
    save_file(tensors, path)
    with pytest.raises(TunerFileError, match="does not fit this base: it has shape"):
        import_tuner(path, describe_base(make_unet(block_out_channels=(32, 32, 64, 64))))
    save_file({key: value for key, value in tensors.items() if ".11." not in key}, path)
    with pytest.raises(
        TunerFileError, match=r"does not fit this base: it has no tensor for `control\.skip\.0\.0\.down\.bias`"
    ):
        import_tuner(path, base)
    save_file({**tensors, "odd.key": torch.ones(1)}, path)
    with pytest.raises(TunerFileError, match=r"also contains `odd\.key`"):
        import_tuner(path, base)
    slim = {
        key: value[:, :1].clone() if key == "pre_hint_blocks.2.weight" else value for key, value in tensors.items()
    }
    save_file(slim, path)
    with pytest.raises(TunerFileError, match=r"does not fit this base: it has shape \(16, 1, 3, 3\)"):
        import_tuner(path, base)


@pytest.mark.parametrize("structure", [SD15, {**SD15, "cross_attention_dim": 1024}, SDXL], ids=["1.5", "2.1", "XL"])
def test_sc_tuners_of_scepter_in_full_size(tmp_path, structure):
    with torch.device("meta"):
        base = describe_base(UNet2DConditionModel(**structure))
    # `_input_block_chans` of SCEPTER's U-Nets: the widths of the encoder's outputs, shallow to deep.
    widths = [320] * 4 + [640] * 3 + [1280] * (5 if structure is not SDXL else 2)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"model.lsc_identity.{number}.tuner_op.{name}": tensor
        for number, width in enumerate(reversed(widths))
        for name, tensor in sce_adapter(width, int(width * 0.05), generator, torch.float16).items()
    }
    save_file(tensors, tmp_path / "in.safetensors")
    state = import_tuner(tmp_path / "in.safetensors", base).state_dict()
    assert torch.equal(state["skip.skip.0.down.weight"],
                       tensors[f"model.lsc_identity.{len(widths) - 1}.tuner_op.ln1.weight"])  # fmt: skip
    assert torch.equal(
        state[f"skip.skip.{len(widths) - 1}.up.bias"], tensors["model.lsc_identity.0.tuner_op.ln2.bias"]
    )
