"""Parts of the HTTP API that need no engine: names, prompts, uploads, masks and bodies."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from restune_diffusion.pipelines.schedulers import SCHEDULER_NAMES, check_scheduler_name, sampler_labels
from restune_diffusion.serving.http.a1111.inpaint import fill_area, repaint
from restune_diffusion.serving.http.a1111.samplers import samplers, scheduler_of
from restune_diffusion.serving.http.bodies import GenerationBody, Img2ImgBody, Txt2ImgBody, read_body
from restune_diffusion.serving.http.errors import RequestError
from restune_diffusion.serving.http.limits import Limits
from restune_diffusion.serving.http.model_names import checked_tuners, tuners_of_model, tuners_of_prompt
from restune_diffusion.serving.http.uploads import decode_base64_image, decode_image, edit_mask

KNOWN = frozenset({"water", "ink", "people/ann", "a+b", "old:2"})
BASES = frozenset({"base", "sd15"})


@pytest.mark.parametrize(
    ("model", "tuners"),
    [
        (None, ()),
        ("base", ()),
        ("sd15", ()),
        ("water", (("water", 1.0),)),
        ("water:0.8", (("water", 0.8),)),
        ("water:0.8+ink:-0.4", (("water", 0.8), ("ink", -0.4))),
        ("base+people/ann:.5", (("people/ann", 0.5),)),
        ("a+b", (("a+b", 1.0),)),
        ("old:2", (("old:2", 1.0),)),
        ("water+old:2", (("water", 1.0), ("old:2", 1.0))),
    ],
)
def test_a_model_name_is_a_mix_of_tuners(model, tuners):
    assert tuners_of_model(model, KNOWN, BASES) == tuners


@pytest.mark.parametrize("model", ["", "fire", "water+", "../water", "water/../ink", "WATER", "base:0.5", "a+b:1"])
def test_an_unknown_model_is_not_found(model):
    with pytest.raises(RequestError, match="does not exist; GET /v1/models") as caught:
        tuners_of_model(model, KNOWN, BASES)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@pytest.mark.parametrize("weight", ["", "much", "nan", "inf", "1e999", "٣"])
def test_a_weight_is_a_number(weight):
    with pytest.raises(RequestError, match="is not a number"):
        tuners_of_model(f"water:{weight}", KNOWN, BASES)


def test_tags_of_a_prompt_are_tuners():
    prompt = "a fox, <lora:ink:0.5> at night <lora:people/ann> <LYCO:old:2>"
    tuners = (("ink", 0.5), ("people/ann", 1.0), ("old:2", 1.0))
    assert tuners_of_prompt(prompt, KNOWN) == ("a fox, at night", tuners)
    assert tuners_of_prompt("  a <b> c  ", KNOWN) == ("  a <b> c  ", ())
    with pytest.raises(RequestError, match=r"has 2 weights; use one, as in `<lora:ink:0\.8>`"):
        tuners_of_prompt("<lora:ink:0.5:0.7>", KNOWN)
    with pytest.raises(RequestError, match="The tuner `ghost` of the tag") as caught:
        tuners_of_prompt("<lora:ghost:1>", KNOWN)
    assert caught.value.status == 404


def test_tuners_are_few_different_and_not_too_strong():
    limits = Limits(tuners=2, weight=3.0)
    assert checked_tuners([("ink", 3.0), ("water", -3.0)], KNOWN, limits) == (("ink", 3.0), ("water", -3.0))
    for tuners, sentence in (
        ([("ink", 1.0)] * 3, "names 3 tuners; this server allows 2"),
        ([("ink", 1.0)] * 2, "is named twice"),
        ([("ink", 3.1)], "use a number from -3 to 3"),
        ([("nobody", 1.0)], "does not exist"),
    ):
        with pytest.raises(RequestError, match=sentence):
            checked_tuners(tuners, KNOWN, limits)


@pytest.mark.parametrize(
    ("sampler", "schedule", "name"),
    [
        (None, None, None),
        ("", "automatic", None),
        ("Euler a", "Automatic", "euler_a"),
        ("DPM++ 2M", None, "dpmpp_2m_karras"),
        ("DPM++ 2M Karras", "automatic", "dpmpp_2m_karras"),
        ("DPM++ 2M", "exponential", "dpmpp_2m_exponential"),
        ("euler_karras", None, "euler_karras"),
        ("DDIM", "automatic", "ddim"),
    ],
)
def test_samplers_of_a1111_are_schedulers(sampler, schedule, name):
    assert scheduler_of(sampler, schedule) == name


def test_a_schedule_type_without_a_sampler_is_refused():
    assert scheduler_of(None, "Automatic") is None
    with pytest.raises(RequestError, match="The schedule type `karras` needs a sampler"):
        scheduler_of("", "Karras")


def test_every_listed_sampler_can_be_used():
    assert set(sampler_labels()) == set(SCHEDULER_NAMES)
    for sampler in samplers():
        name = scheduler_of(sampler["name"], "automatic")
        assert name is not None
        check_scheduler_name(name)
    with pytest.raises(RequestError, match="Unknown schedule type `slow`"):
        scheduler_of("Euler", "slow")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "The parameter `prompt` is missing."),
        ({"prompt": ["a"]}, "Invalid `prompt`: input should be a valid string."),
        ({"prompt": "a", "n": 0}, "Invalid `n`: input should be greater than or equal to 1."),
        ({"prompt": "a", "x" * 500: 1}, f"Unknown parameter `{'x' * 80}`; leave it out."),
        (
            {"prompt": "\ud800"},
            "Invalid `prompt`: input should be a valid string, unable to parse raw data as a unicode string.",
        ),
        ({"prompt": "a", "guidance": float("nan")}, "Invalid `guidance`: input should be a finite number."),
        ({"prompt": "a", "seed": 2**63}, f"Invalid `seed`: input should be less than or equal to {2**63 - 1}."),
        ({"prompt": "a", "tuners": [{"nam": 1}]}, "The parameter `tuners.0.name` is missing."),
    ],
)
def test_the_first_fault_of_a_body_is_one_sentence(values, sentence):
    with pytest.raises(RequestError) as caught:
        read_body(GenerationBody, values)
    assert str(caught.value) == sentence


def test_fields_of_a1111_without_effect_are_ignored():
    assert read_body(Txt2ImgBody, {"prompt": "a", "s_noise": 1, "firstphase_width": 0}).prompt == "a"


def png(width: int, height: int) -> bytes:
    """A PNG file whose header promises this size, and whose pixels are a few compressed zeros."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("size", [(5000, 5000), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (2**24, 2)])
def test_an_image_of_many_pixels_is_refused_before_it_is_decoded(size, monkeypatch):
    from PIL import PngImagePlugin

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(RequestError, match="`image` has too many pixels; this server takes 16777216") as caught:
        decode_image(png(*size), Limits(), "image")
    assert caught.value.status == 413


def test_only_intact_still_images_are_decoded():
    red = Image.new("RGB", (8, 8), "red")
    for kind in ("PNG", "JPEG", "WEBP"):
        assert decode_image(encoded(red, kind), Limits(), "image").size == (8, 8)
    frames = {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "blue")]}
    with pytest.raises(RequestError, match="is animated"):
        decode_image(encoded(red, "WEBP", **frames), Limits(), "image")
    noise = encoded(Image.effect_noise((64, 64), 50))
    for content in (b"", b"GIF89a", encoded(red, "GIF"), encoded(red, "TIFF"), noise[: len(noise) // 2]):
        with pytest.raises(RequestError, match="cannot be read as an image; send a PNG, JPEG or WebP file"):
            decode_image(content, Limits(), "image")


def test_a_photo_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif), Limits(), "image").size == (4, 8)


def test_base64_may_be_a_data_url():
    text = base64.b64encode(encoded(Image.new("RGB", (8, 4)))).decode()
    for given in (text, f"data:image/png;base64,{text}"):
        assert decode_base64_image(given, Limits(), "mask").size == (8, 4)
    for broken in ("", "not base64!", text + "é", "http://127.0.0.1/x.png", "/etc/passwd", "file:///etc/passwd"):
        with pytest.raises(RequestError, match="`mask`"):
            decode_base64_image(broken, Limits(), "mask")


def test_the_transparent_area_of_a_mask_is_repainted():
    image = Image.new("RGB", (4, 2))
    mask = Image.new("RGBA", (4, 2), (255, 255, 255, 255))
    mask.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(edit_mask(mask, image)).tolist() == [[0, 255, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(RequestError, match="has no transparent pixels"):
        edit_mask(Image.new("RGBA", (4, 2), "white"), image)
    with pytest.raises(RequestError, match="send one of the image's size"):
        edit_mask(mask, Image.new("RGB", (4, 3)))


def halves() -> tuple[Image.Image, Image.Image]:
    """A green image with a red square, and the mask of the square."""
    image, mask = Image.new("RGB", (64, 48), (0, 128, 0)), Image.new("L", (64, 48), 0)
    image.paste((255, 0, 0), (8, 8, 24, 24))
    mask.paste(255, (8, 8, 24, 24))
    return image, mask


def inpaint_body(**values) -> Img2ImgBody:
    return read_body(Img2ImgBody, {"init_images": ["x"], "mask_blur": 0, **values})


def test_a_filled_area_has_the_colors_around_it():
    image, mask = halves()
    filled = np.asarray(fill_area(image, mask))
    assert filled[16, 16, 0] < 30
    assert np.array_equal(filled[30:], np.asarray(image)[30:])


def test_a_crop_has_the_proportions_of_the_generated_image_and_is_pasted_back():
    image, mask = halves()
    area = repaint(image, mask, inpaint_body(inpainting_fill=1, inpaint_full_res_padding=4), (64, 32))
    assert area.box == (0, 4, 48, 28)
    assert area.image.size == area.mask.size == (64, 32)
    result = np.asarray(area.pasted(Image.new("RGB", (64, 32), "blue")))
    assert result[8:24, 8:24].tolist() == [[[0, 0, 255]] * 16] * 16
    changed = (result != np.asarray(image)).any(-1)
    assert changed.sum() == 16 * 16


def test_a_whole_image_is_repainted_at_the_generated_size():
    image, mask = halves()
    area = repaint(image, mask, inpaint_body(inpaint_full_res=False, inpainting_mask_invert=True), (32, 24))
    assert (area.box, area.image.size) == (None, (32, 24))
    assert area.mask.getpixel((8, 8)) == 0
    assert area.mask.getpixel((28, 20)) == 255
    blue = Image.new("RGB", (32, 24), "blue")
    assert area.pasted(blue) is blue


def test_an_empty_mask_and_unknown_fillings_are_refused():
    image, _ = halves()
    with pytest.raises(RequestError, match="The mask is empty"):
        repaint(image, Image.new("L", (64, 48), 0), inpaint_body(), (64, 48))
    with pytest.raises(RequestError, match="Invalid `inpainting_fill`"):
        inpaint_body(inpainting_fill=2)
