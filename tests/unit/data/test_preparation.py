from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from restune_diffusion.data.buckets import Buckets
from restune_diffusion.data.example import Example
from restune_diffusion.data.image_files import Crop, read_image
from restune_diffusion.data.image_transform import ImageTransform
from restune_diffusion.data.loss_masks import MaskFiles, alpha_mask, cropped_mask, latent_mask
from restune_diffusion.data.refusals import Refused
from restune_diffusion.data.training_images import Sample, load_samples
from restune_diffusion.imaging.image_files import decode_layer
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.utils.errors import DataError

from ...tiny_training import scheduler, sd_pipeline

MakeConfig = Callable[..., TrainConfig]


def gradient(width: int, height: int) -> Image.Image:
    """Return an image with the column in red and the row in green."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None], np.arange(height)[:, None]
    return Image.fromarray(pixels)


def views(path: Path, preparation: ImageTransform, refused: list[Refused] | None = None) -> list[Sample]:
    return list(load_samples([Example(path, "x")], 0, preparation=preparation, refused=refused))


def as_bytes(sample: Sample) -> np.ndarray:
    return ((sample.pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def test_framing_cuts_and_mirrors() -> None:
    picture = gradient(40, 30)
    crop = Crop((40, 30), (5, 7), (16, 8))
    cut, mirrored = (
        np.asarray(crop.apply(picture)),
        np.asarray(Crop((40, 30), (5, 7), (16, 8), mirrored=True).apply(picture)),
    )
    assert cut[..., 0].tolist() == [list(range(5, 21))] * 8
    assert cut[:, 0, 1].tolist() == list(range(7, 15))
    np.testing.assert_array_equal(mirrored, cut[:, ::-1])


def test_the_corner_of_a_mirrored_crop_is_that_of_the_mirrored_image() -> None:
    told = Crop((40, 30), (5, 7), (16, 8), mirrored=True).size_conditioning((80, 60))
    # columns 5 to 20 of 40 are columns 19 to 34 of the mirrored image
    assert (told.original, told.corner, told.size) == ((60, 80), (7, 19), (8, 16))
    mirrored = Image.fromarray(np.asarray(gradient(40, 30))[:, ::-1].copy())
    again = Crop((40, 30), (19, 7), (16, 8)).apply(mirrored)
    np.testing.assert_array_equal(again, Crop((40, 30), (5, 7), (16, 8), mirrored=True).apply(gradient(40, 30)))


def test_random_cuts_depend_on_seed_and_image_alone_and_show_other_parts() -> None:
    preparation = ImageTransform(Buckets([(16, 16)]), crop_variants=6, seed=3)
    cuts = preparation.crops((64, 16), b"one")
    assert cuts == preparation.crops((64, 16), b"one")
    assert cuts != preparation.crops((64, 16), b"two")
    assert cuts != ImageTransform(Buckets([(16, 16)]), crop_variants=6, seed=4).crops((64, 16), b"one")
    lefts = [cut.corner[0] for cut in cuts]
    assert len(set(lefts)) > 3
    assert all(0 <= left <= 48 for left in lefts)
    assert len(preparation.crops((32, 32), b"one")) == 1, "an image that fits has but one cut"
    many = ImageTransform(Buckets([(16, 16)]), crop_variants=500).crops((20, 16), b"one")
    assert {cut.corner for cut in many} == {(left, 0) for left in range(5)}


def test_flip_keeps_both_sides_of_every_cut(tmp_path: Path) -> None:
    gradient(64, 16).save(tmp_path / "a.png")
    samples = views(tmp_path / "a.png", ImageTransform(Buckets([(16, 16)]), crop_variants=2, flip=True))
    assert [sample.further for sample in samples] == [False, True, True, True]
    for plain, mirrored in (samples[:2], samples[2:]):
        assert torch.equal(plain.pixels.flip(2), mirrored.pixels)
    assert not torch.equal(samples[0].pixels, samples[2].pixels)


def test_lines_and_specks_are_refused_with_their_size(tmp_path: Path) -> None:
    for size in ((2000, 1), (1, 1), (20, 1)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        refused: list[Refused] = []
        samples = views(tmp_path / "a.png", ImageTransform(Buckets([(32, 32)])), refused)
        assert not samples
        assert f"{size[0]} x {size[1]} pixels" in refused[0].reason


def test_a_mask_is_cropped_exactly_as_its_image(tmp_path: Path) -> None:
    picture = gradient(60, 40)
    # the mask equals the red channel at each pixel
    picture.putalpha(picture.getchannel("R").point(lambda value: value * 4))
    picture.save(tmp_path / "a.png")
    plain = gradient(60, 40)
    plain.save(tmp_path / "b.png")
    preparation = ImageTransform(
        Buckets([(24, 16)]), crop_variants=4, flip=True, masks=alpha_mask, background=(0, 0, 0)
    )
    for sample in views(tmp_path / "a.png", preparation):
        assert sample.mask is not None
        assert sample.mask.shape == (1, 16, 24)
        # composed on black, red is red * alpha / 255; both fall and rise together
        red, alpha = as_bytes(sample)[..., 0].astype(float), sample.mask[0].numpy() * 255
        np.testing.assert_allclose(red, alpha**2 / 4 / 255, atol=2.5)
    (whole, *_) = views(tmp_path / "b.png", preparation)
    assert whole.mask is not None
    assert bool((whole.mask == 1).all()), "a picture without alpha counts everywhere"


def test_mask_files_are_found_by_name_and_follow_the_cut(tmp_path: Path) -> None:
    (tmp_path / "masks" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    path = tmp_path / "images" / "sub" / "a.jpg"
    gradient(60, 40).save(path, quality=100)
    # half the size of its image, white on the left third
    mask = Image.new("L", (30, 20))
    mask.paste(255, (0, 0, 10, 20))
    mask.save(tmp_path / "masks" / "sub" / "a.png")
    source = MaskFiles(tmp_path / "masks", tmp_path / "images")
    preparation = ImageTransform(Buckets([(40, 40)]), flip=True, masks=source)
    plain, mirrored = views(path, preparation)
    assert plain.mask is not None
    assert mirrored.mask is not None
    # 10 columns on each side of the image are cropped; ten columns of the left third, 0 to 19, remain
    assert plain.mask[0, :, :9].min() == 1
    assert plain.mask[0, :, 11:].max() == 0
    assert torch.equal(plain.mask.flip(2), mirrored.mask)


@pytest.mark.parametrize(
    ("name", "size", "colour", "reason"),
    [("b.png", (60, 40), 255, "has no mask of the same name"), ("a.png", (60, 60), 255, "its mask"),
     ("a.png", (60, 40), 0, "a mask that is black")],
)  # fmt: skip
def test_images_whose_mask_cannot_be_used_are_refused(
    tmp_path: Path, name: str, size: tuple[int, int], colour: int, reason: str
) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    gradient(60, 40).save(tmp_path / "images" / "a.png")
    Image.new("L", size, colour).save(tmp_path / "masks" / name)
    source = MaskFiles(tmp_path / "masks", tmp_path / "images")
    refused: list[Refused] = []
    assert not views(tmp_path / "images" / "a.png", ImageTransform(Buckets([(16, 16)]), masks=source), refused)
    assert reason in str(refused[0])


def test_masks_among_the_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="lies inside the image folder"):
        MaskFiles(tmp_path / "masks", tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        MaskFiles(tmp_path / "none", tmp_path)


def test_a_latent_pixel_gets_the_mean_of_its_area() -> None:
    mask = torch.zeros(1, 8, 4)
    mask[0, :4, :2] = 1
    mask[0, 4, 0] = 1
    assert latent_mask(mask, torch.Size((4, 2, 1)))[0].tolist() == [[0.5], [1 / 16]]
    framed = cropped_mask(Image.new("L", (8, 8), 51), Crop((4, 4), (0, 0), (4, 4)))
    assert torch.allclose(framed, torch.full((1, 4, 4), 0.2))


def test_the_masked_loss_is_the_weighted_mean_of_each_sample() -> None:
    objective = Objective(scheduler(), snr_gamma=5)
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 4, 5, generator=generator)
    mask = torch.rand(3, 1, 4, 5, generator=generator)
    timesteps = torch.tensor([1, 500, 900])
    expected = 0.0
    for number in range(3):
        above, below = 0.0, 0.0
        for channel in range(4):
            for row in range(4):
                for column in range(5):
                    weight = mask[number, 0, row, column].item()
                    error = (prediction - target)[number, channel, row, column].item()
                    above += weight * error**2
                    below += weight
        expected += objective.weights(timesteps[number : number + 1]).item() * above / below / 3
    assert objective.loss(prediction, target, timesteps, mask).item() == pytest.approx(expected, rel=1e-5)
    plain = objective.loss(prediction, target, timesteps)
    even = objective.loss(prediction, target, timesteps, torch.full_like(mask, 0.3))
    assert even.item() == pytest.approx(plain.item())


def test_batches_weigh_what_is_not_masked_at_least_so_much(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 8, 16))
    picture.save(tmp_path / "a.png")
    preparation = ImageTransform(Buckets([(16, 16)]), flip=True, masks=alpha_mask)
    cache = build_cache(sd_pipeline(), views(tmp_path / "a.png", preparation))
    assert (len(cache), len(cache.latents), len(cache.masks)) == (1, 2, 2)
    batch = Batches(
        cache, seed=0, size=20, timesteps=10, caption_dropout=0, device=torch.device("cpu"), dtype=torch.float32,
        unmasked_weight=0.25,
    )[0]  # fmt: skip
    assert batch.mask is not None
    assert batch.mask.shape == (20, 1, 8, 8)
    rows = {tuple(mask[0, 0].tolist()) for mask in batch.mask}
    assert rows == {(1.0,) * 4 + (0.25,) * 4, (0.25,) * 4 + (1.0,) * 4}


def test_a_masked_run_counts_what_the_mask_shows(config: MakeConfig, tmp_path: Path) -> None:
    picture = gradient(16, 16).convert("RGBA")
    picture.putalpha(Image.fromarray(np.repeat(np.array([[0] * 8 + [255] * 8], np.uint8), 16, 0)))
    (tmp_path / "data").mkdir()
    picture.save(tmp_path / "data" / "a.png")

    def loss(name: str, **settings: Any) -> float:
        settings |= {"data": tmp_path / "data", "output": tmp_path / name, "prompt": "x", "steps": 1, "batch_size": 1}
        return train(config(**settings), verbose=False).losses[0]

    plain = loss("plain")
    assert loss("all", masked_loss="alpha", unmasked_weight=1) == pytest.approx(plain, rel=1e-5)
    assert abs(loss("half", masked_loss="alpha", unmasked_weight=0) / plain - 1) > 0.01


def test_modes_keep_their_colours(tmp_path: Path) -> None:
    def read(name: str) -> tuple[int, ...]:
        value = read_image(tmp_path / name)[0].getpixel((1, 1))
        assert isinstance(value, tuple)
        return tuple(map(int, value))

    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert read("cmyk.jpg") == pytest.approx((255, 0, 0), abs=3)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "palette.png")
    assert read("palette.png") == (10, 200, 30)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name, options in {"moving.gif": {}, "moving.webp": {"lossless": True}, "moving.png": {}}.items():
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert read(name) == (255, 0, 0), name
    Image.new("L", (4, 4), 90).save(tmp_path / "gray.png")
    assert read("gray.png") == (90, 90, 90)
    Image.fromarray(np.full((4, 4), 90 * 257, np.uint16)).save(tmp_path / "deep.png", transparency=0)
    assert read("deep.png") == (90, 90, 90)
    Image.fromarray(np.full((4, 4), 90 * 257, np.uint16)).save(tmp_path / "hidden.png", transparency=90 * 257)
    assert read("hidden.png") == (255, 255, 255)
    Image.new("F", (4, 4), 0.5).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="floating-point"):
        read("float.tif")


def test_the_background_is_the_colour_asked_for(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (255, 255, 255, 51)).save(tmp_path / "a.png")
    (sample,) = views(tmp_path / "a.png", ImageTransform(Buckets([(16, 16)]), background=(0, 100, 200)))
    # a fifth of white over the colour
    assert as_bytes(sample)[3, 3].tolist() == [51, 131, 211]
    layer, _ = decode_layer((tmp_path / "a.png").read_bytes())
    assert layer.mode == "RGBA"
