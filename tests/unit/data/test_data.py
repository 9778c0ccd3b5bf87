from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restune_diffusion.data.example import Example
from restune_diffusion.data.image_files import SizeConditioning, centred, read_image
from restune_diffusion.data.training_images import load_samples, to_tensor
from restune_diffusion.imaging.rgb import to_rgb
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.utils.errors import DataError

from ...tiny_training import draw_image, sd_pipeline


def fit(image: Image.Image, resolution: int) -> tuple[torch.Tensor, SizeConditioning]:
    crop = centred(image.size, (resolution, resolution))
    return to_tensor(crop.apply(image)), crop.size_conditioning(image.size)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    image.save(tmp_path / "a.png", exif=exif)
    upright, _ = read_image(tmp_path / "a.png")
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (0, 0, 255)
    assert upright.getpixel((5, 17)) == (255, 0, 0)


def test_transparency_becomes_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    assert [to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 0, 0)]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (1, 1), (9, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_gray_and_16_bit_images_keep_their_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0].getpixel((0, 0)) == (128, 128, 128)
    assert to_rgb(Image.new("L", (1, 1), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("CMYK", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_fit_scales_the_short_side_and_crops_the_centre() -> None:
    image = Image.new("RGB", (30, 10), "red")
    image.paste("white", (10, 0, 20, 10))
    pixels, size_conditioning = fit(image, 10)
    assert torch.equal(pixels, torch.ones(3, 10, 10))
    assert (size_conditioning.original, size_conditioning.corner, size_conditioning.size) == (
        (10, 30),
        (0, 10),
        (10, 10),
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (37, 23), (511, 513)])
def test_fit_gives_the_resolution_whatever_the_size(size: tuple[int, int]) -> None:
    pixels, size_conditioning = fit(Image.new("RGB", size), 16)
    assert pixels.shape == (3, 16, 16)
    assert size_conditioning.original == (size[1], size[0])


def test_unreadable_images_are_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_image("red").save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (3000, 3000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    names = ["cut.png", "good.png", "empty.png", "text.png", "bomb.png", "gone.png"]
    with caplog.at_level(logging.WARNING):
        samples = list(load_samples([Example(tmp_path / name, name) for name in names], 16))
    assert [sample.caption for sample in samples] == ["good.png"]
    assert [name for name in names if name in caplog.text] == [name for name in names if name != "good.png"]


def test_a_folder_of_unreadable_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match="None of the images can be read"):
        build_cache(sd_pipeline(), load_samples([Example(tmp_path / "empty.png", "x")], 16))
