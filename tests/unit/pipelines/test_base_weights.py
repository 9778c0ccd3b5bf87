"""A base's text encoders load whole or not at all, whichever version of transformers wrote the files."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from restune_diffusion import RestuneError
from restune_diffusion.pipelines.load_base import load_base

from ...conftest import TINY_BASE


def test_the_bundled_text_encoder_has_the_keys_that_transformers_4_and_5_read():
    with safe_open(TINY_BASE / "text_encoder" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert len(names) == 68
    assert all(name.startswith("text_model.") for name in names)


def test_every_weight_of_the_bundled_text_encoder_is_the_files():
    stored = load_file(TINY_BASE / "text_encoder" / "model.safetensors")
    loaded = load_base(str(TINY_BASE), torch.float32).text_encoder.state_dict()
    loaded = {name.removeprefix("text_model."): value for name, value in loaded.items()}
    assert loaded.keys() == {name.removeprefix("text_model.") for name in stored}
    for name, value in stored.items():
        assert torch.equal(loaded[name.removeprefix("text_model.")], value.float()), name


def test_both_forms_of_the_bundled_tokenizer_hold_the_same_vocabulary_and_merges():
    folder = TINY_BASE / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert json.loads((folder / "vocab.json").read_text()) == model["vocab"]
    version, *merges = (folder / "merges.txt").read_text().splitlines()
    assert version.startswith("#version")
    assert [tuple(line.split(" ")) for line in merges] == [tuple(pair) for pair in model["merges"]]


def test_the_bundled_tokenizer_gives_the_ids_the_base_was_trained_with():
    tokenizer = load_base(str(TINY_BASE), torch.float32).tokenizer
    assert tokenizer("A red apple's core, 12 cats").input_ids == [
        *(49406, 320, 736, 3055, 568, 5000, 267, 272, 273, 3989, 49407),
    ]


def test_a_text_encoder_that_lacks_weights_is_refused_and_not_filled_at_random(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY_BASE, base, ignore=shutil.ignore_patterns("*.png"))
    file = base / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    del weights["text_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RestuneError, match=r"`text_encoder` lacks 1 weights .*encoder\.layers\.1\.mlp\.fc1\.weight"):
        load_base(str(base), torch.float32)
