"""Built-in captioners: their text against the model's own output, and tags against known scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, ViTImageProcessor

from restune_diffusion.data.captioning import CaptionerSettings, load_captioner, register_captioner
from restune_diffusion.data.captioning.builtin.onnx_tagger import prepared, spaced
from restune_diffusion.data.captioning.registry import _FACTORIES
from restune_diffusion.utils.errors import DataError

from .models import (
    SIDE,
    write_blip,
    write_chat_model,
    write_classifier,
    write_encoder_decoder,
    write_tagger,
)


def noise(count: int = 3) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize((20, 16), Image.Resampling.NEAREST) for image in images]


def color(red: int, green: int, blue: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (red, green, blue))


def captioner(name: str, folder: Path, **settings):
    return load_captioner(name, CaptionerSettings(model=str(folder), device="cpu", max_tokens=6, **settings))


def test_an_encoder_decoder_gives_its_own_text(tmp_path):
    folder = write_encoder_decoder(tmp_path / "model")
    images = noise()
    found = captioner("transformers", folder)(images)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    pixels = ViTImageProcessor(size={"height": SIDE, "width": SIDE})(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = model.generate(pixels, do_sample=False, max_new_tokens=6)
    texts = AutoTokenizer.from_pretrained(folder).batch_decode(tokens, skip_special_tokens=True)
    assert found == texts
    assert len(set(found)) == 3
    assert captioner("transformers", folder, prompt="a photo")(images[:1])[0].startswith("a photo ")


def test_blip_begins_its_captions_with_the_prompt(tmp_path):
    folder = write_blip(tmp_path / "model")
    images = noise()
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    for prompt in (None, "a photo"):
        text = {} if prompt is None else {"text": [prompt] * 3}
        with torch.no_grad():
            tokens = model.generate(
                **processor(images=images, return_tensors="pt", **text), do_sample=False, max_new_tokens=6
            )
        found = captioner("transformers", folder, prompt=prompt)(images)
        assert found == processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        assert all(caption.startswith(prompt or found[0]) for caption in found)


def test_a_chat_model_answers_without_repeating_the_prompt(tmp_path):
    folder = write_chat_model(tmp_path / "model")
    images = noise()
    found = captioner("transformers", folder, prompt="new photo")(images)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs = processor(images=images[:1], text="user : <image> new photo assistant : ", return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    assert found[0] == processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()
    assert len(set(found)) > 1
    assert not any("assistant :" in text for text in found)
    # Another prompt changes the answers.
    assert captioner("transformers", folder)(images) != found


def test_a_model_that_cannot_be_used_is_refused_in_one_sentence(tmp_path):
    for folder, reason in (
        (tmp_path / "none", "There is no captioning model at"),
        (write_classifier(tmp_path / "bert"), "is a model of type bert"),
    ):
        with pytest.raises(DataError, match=reason):
            captioner("transformers", folder)
    folder = write_encoder_decoder(tmp_path / "pickled")
    torch.save(AutoModelForImageTextToText.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no safetensors weights"):
        captioner("transformers", folder)
    with pytest.raises(DataError, match="needs a model"):
        load_captioner("transformers", CaptionerSettings())


def test_the_tagger_reads_blue_green_red_and_orders_tags_by_score(tmp_path):
    tag = captioner("onnx", write_tagger(tmp_path))
    # Scores: much_blue from blue, much_green from green, o_o and miku_(series) from red; the rating is left out.
    assert tag([color(0, 0, 255)]) == ["much blue"]
    assert tag([color(0, 180, 255)]) == ["much blue, much green"]
    assert tag([color(0, 255, 180)]) == ["much green, much blue"]
    assert tag([color(255, 0, 0)]) == ["o_o, miku (series)"]
    # 1 / (1 + exp(-10 (160 / 255 - 0.5))) = 0.782: above 0.35, below 0.85.
    assert tag([color(160, 0, 0)]) == ["o_o"]
    assert tag([color(0, 0, 0)]) == [""]
    low = captioner("onnx", tmp_path, general_threshold=0.8, character_threshold=0.75)
    assert low([color(160, 0, 0)]) == ["miku (series)"]


def test_the_tagger_pads_with_white_to_a_square(tmp_path):
    pixels = prepared(color(10, 20, 30, (8, 4)), 8)
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels[:2], np.full((2, 8, 3), 255))
    assert np.array_equal(pixels[6:], np.full((2, 8, 3), 255))
    assert np.array_equal(pixels[2:6], np.broadcast_to([30, 20, 10], (4, 8, 3)))
    assert prepared(color(10, 20, 30, (32, 32)), 8).shape == (8, 8, 3)
    # Half of the square is white: the mean of every channel is above 127.5.
    tag = captioner("onnx", write_tagger(tmp_path))
    assert tag([color(0, 10, 20, (8, 4))]) == ["much blue, much green, o_o"]


def test_a_tagger_exported_for_one_batch_size_takes_any_number(tmp_path):
    tag = captioner("onnx", write_tagger(tmp_path, batch=2))
    assert tag([color(0, 0, 255), color(0, 255, 0), color(255, 0, 0)]) == [
        "much blue", "much green", "o_o, miku (series)",
    ]  # fmt: skip


def test_kaomojis_keep_their_underscores():
    assert [spaced(tag) for tag in ("long_hair", ">_<", "^_^", "||_||", "o_o_o")] == [
        "long hair", ">_<", "^_^", "||_||", "o o o",
    ]  # fmt: skip


def test_a_damaged_tagger_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"has no model\.onnx"):
        captioner("onnx", tmp_path)
    folder = write_tagger(tmp_path / "short")
    table = folder / "selected_tags.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match=r"has 5 outputs but selected_tags\.csv has 4 tags"):
        captioner("onnx", folder)
    table.write_text("red, blue\n1, 2\n")
    with pytest.raises(DataError, match="is not a table of tags"):
        captioner("onnx", folder)
    (write_tagger(tmp_path / "broken") / "model.onnx").write_bytes(b"no model")
    with pytest.raises(DataError, match="cannot be loaded"):
        captioner("onnx", tmp_path / "broken")


def test_a_captioner_is_registered_by_name_once(monkeypatch):
    monkeypatch.setattr("restune_diffusion.data.captioning.registry._FACTORIES", dict(_FACTORIES))
    register_captioner("sizes", lambda settings: lambda images: [f"{settings.prompt} {i.width}" for i in images])
    assert load_captioner("sizes", CaptionerSettings(prompt="wide"))([color(0, 0, 0)]) == ["wide 8"]
    for name in ("sizes", "onnx", "a:b"):
        with pytest.raises(DataError, match="taken or has a colon"):
            register_captioner(name, lambda settings: lambda images: [])
    for name, reason in (
        ("blip", "There is no captioner blip"),
        ("no_such_module:describe", "cannot be imported"),
        ("math:describe", "has no describe"),
        ("math:pi", "is not a function"),
    ):
        with pytest.raises(DataError, match=reason):
            load_captioner(name, CaptionerSettings())
