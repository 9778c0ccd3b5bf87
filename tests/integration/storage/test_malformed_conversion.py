"""Damaged and hostile files of other programs: refused with our error, or read correctly."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import warnings

import pytest
import torch
from safetensors.torch import save

from restune_diffusion import RestuneError, describe_base
from restune_diffusion.conversion import export_tuner, import_tuner

from ...conftest import make_unet
from ...unit.conversion.swift_files import swift_tensors
from ...unit.conversion.test_csc import published
from ...unit.conversion.test_lora import kohya_tensors, linear_modules

VALUES = [None, True, -1, 0, 10**400, 1e308, float("nan"), "x", "../../x", "x" * 5000, [], {}, [[]], {"unet.r": -1}]


NAMES = ["", ".", "x" * 300, "lora_unet_.lora_down.weight", "0.lsc_tuner_blocks.99.tuner_op.ln1.bias",
         "a.scetuner_.tuner_op.ln1.bias", "model.lsc_identity.999.tuner_op.ln1.bias", "x.lora_A.weight"]  # fmt: skip


def lora_of_diffusers(unet):
    tensors = {}
    for name, value in kohya_tensors(unet, linear_modules(unet, ["to_v"])).items():
        stem, _, kind = name.partition(".")
        if kind != "alpha":
            module = next(m for m in linear_modules(unet, ["to_v"]) if f"lora_unet_{m}".replace(".", "_") == stem)
            tensors[f"unet.{module}.lora_{'A' if 'down' in kind else 'B'}.weight"] = value
    header = {"unet.r": 4, "unet.lora_alpha": 2, "unet.rank_pattern": {}, "unet.alpha_pattern": {"to_v": 3}}
    return save(tensors, {"lora_adapter_metadata": json.dumps(header)})


@pytest.fixture(scope="module")
def sources():
    unet = make_unet()
    base = describe_base(unet)
    return base, {
        "kohya": save(kohya_tensors(unet, linear_modules(unet, ["to_k"])), {"ss_seed": "1"}),
        "diffusers": lora_of_diffusers(unet),
        "swift": save(swift_tensors(base, 0.1), {"restune.interchange.widths": '{"skip.0": 2}'}),
        "csc": save({key: value.half() for key, value in published(base, 1, 0.1)[1].items()}),
    }


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Change a safetensors file in one of several ways."""
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    way = rng.randrange(8)
    if way == 0:
        flipped = bytearray(content)
        for _ in range(rng.randint(1, 20)):
            flipped[rng.randrange(min(len(flipped), 4000))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if way == 1:
        return content[: rng.randrange(len(content))]
    key = rng.choice([key for key in header if key != "__metadata__"])
    if way == 2:
        header[key]["shape"] = [rng.choice([0, 1, 3, 2**40, 2**63]) for _ in range(rng.randrange(5))]
    elif way == 3:
        header[rng.choice([*NAMES, key + ".x"])] = header.pop(key)
    elif way == 4:
        del header[key]
    elif way == 5:
        header[key]["dtype"] = rng.choice(["I64", "F16", "BF16", "U8", "F8_E4M3", "BOOL", "x"])
    elif way == 6:
        metadata = header.setdefault("__metadata__", {})
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        settings[f"unet.{rng.choice(['lora_alpha', 'alpha_pattern', 'use_rslora', 'bias'])}"] = rng.choice(VALUES)
        metadata["lora_adapter_metadata"] = rng.choice([json.dumps(settings), "[" * 50_000, "{", "null", '"x"'])
    else:
        value = rng.choice([float("nan"), float("inf"), 0.0, -1e30, 1e-45])
        body = bytearray(body)
        body[: 4 * 3] = struct.pack("<3f", value, value, value)
        # The first tensor may be an alpha of one value or a weight.
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(body)


@pytest.mark.parametrize("kind", ["kohya", "diffusers", "swift", "csc"])
def test_a_mutated_file_is_refused_or_read(sources, tmp_path, kind):
    base, files = sources
    rng = random.Random(kind)
    path = tmp_path / "in.safetensors"
    lengths: list[int] = []
    for _ in range(60):
        path.write_bytes(mutated(files[kind], rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tuner = import_tuner(path, base, partial=rng.random() < 0.5)
            except RestuneError as error:
                lengths.append(len(str(error)))
                continue
        assert all(torch.isfinite(value).all() for value in tuner.state_dict().values())
        if kind != "csc":
            export_tuner(tuner, tmp_path / "out", kind)
    assert 20 < len(lengths) < 60
    assert max(lengths) < 1500


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["lora_alpha", "tuner_mode", "alpha_pattern"])
def test_settings_beside_a_file_may_be_anything(sources, tmp_path, key, value):
    base, files = sources
    for kind, content in files.items():
        (tmp_path / f"{kind}.safetensors").write_bytes(
            content.replace(b"lora_adapter_metadata", b"lora_adapter_metadatX")
        )
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, key: value}))
        with contextlib.suppress(RestuneError):
            import_tuner(tmp_path / f"{kind}.safetensors", base)
