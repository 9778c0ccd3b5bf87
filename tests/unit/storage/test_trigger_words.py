"""Trigger words of a tuner show wherever it is described."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from restune_diffusion import SkipConfig, Tuner, read_info, save_tuner
from restune_diffusion.cli.inspect import as_text
from restune_diffusion.storage.model_card import model_card

from ...conftest import make_unet

CASES = {
    "recorded": ({"trigger_words": ["sks", "<dog>"]}, {}, ["sks", "<dog>"], "sks, <dog>"),
    "phrase": (None, {"modelspec.trigger_phrase": "sks, <dog>"}, ["sks", "<dog>"], "sks, <dog>"),
    "in the prompt": (
        {"trigger_words": ["sks"], "config": {"prompt": "a photo of sks dog"}}, {}, ["sks"], "a photo of sks dog",
    ),
    "beside it": ({"trigger_words": ["sks"], "config": {"prompt": "ink style"}}, {}, ["sks"], "sks, ink style"),
    "none": (None, {}, [], None),
    "odd": ({"trigger_words": "sks"}, {"modelspec.trigger_phrase": " , "}, [], None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_trigger_words_are_in_the_card_and_in_inspect(tmp_path, case):
    training, metadata, words, phrase = CASES[case]
    path = tmp_path / "ink.safetensors"
    save_tuner(Tuner.for_base(make_unet(), SkipConfig(ratio=0.1)), path, training=training, metadata=metadata)
    info = read_info(path)
    assert info.trigger_words == words
    text = model_card(info, "me/ink")
    assert ModelCard(text).data.to_dict().get("instance_prompt") == phrase
    assert f"image = pipe({phrase or 'a prompt'!r})" in text
    for word in words:
        assert f"`{word}`" in text
    lines = [line.split(maxsplit=1)[1] for line in as_text(info).splitlines() if line.startswith("trigger ")]
    assert lines == ([", ".join(words)] if words else [])
