import numpy as np
import pytest
import torch
from PIL import Image

from restune_diffusion import RestuneError, SkipConfig, TunerManager, TunerWeight, attach, load_mask, mask_from_image

from ...conftest import make_inputs, randomize
from ..hooks.test_attachment import run, trained


def left_half(size=16):
    image = Image.new("L", (size, size), "black")
    image.paste(255, (0, 0, size // 2, size))
    return image


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "LA", "P"])
def test_white_is_where_a_tuner_acts_in_every_mode(mode):
    mask = mask_from_image(left_half().convert(mode))
    assert mask.dtype == torch.float32
    assert torch.equal(mask, (torch.arange(16) < 8).float().expand(16, 16))


def test_what_is_transparent_counts_as_black():
    image = Image.new("RGBA", (2, 1), "white")
    image.putpixel((1, 0), (255, 255, 255, 0))
    assert mask_from_image(image).tolist() == [[1.0, 0.0]]


def test_sixteen_bits_are_not_cut_off():
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    torch.testing.assert_close(mask_from_image(image), torch.tensor([[0.0, 32768 / 65535, 1.0]]))


def test_a_mask_file_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    left_half().save(tmp_path / "mask.png", exif=exif)
    assert load_mask(tmp_path / "mask.png")[0].tolist() == [0.0] * 8 + [1.0] * 8


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "mask.png").write_bytes(b"no image")
    for name in ("mask.png", "gone.png"):
        with pytest.raises(RestuneError, match=name):
            load_mask(tmp_path / name)


def test_two_tuners_share_a_picture(unet):
    """On the left of a skip one tuner acts, on the right the other, each as if it were there alone."""
    seen = []
    tuners = {name: trained(unet, SkipConfig(), seed) for seed, name in enumerate(["water", "ink"])}
    for seed, (name, tuner) in enumerate(tuners.items()):
        randomize(tuner, seed, std=0.3)
        attach(unet, tuner, name)
    # Behind the tuners' own hook, so that it sees what the decoder will.
    unet.up_blocks[-1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["res_hidden_states_tuple"][0]), with_kwargs=True
    )
    manager = TunerManager.of(unet)
    mask = mask_from_image(left_half(64))
    plans = [{}, {"water": 1.0}, {"ink": 1.0}, {"water": TunerWeight(mask=mask), "ink": TunerWeight(mask=1 - mask)}]
    outputs = []
    for plan in plans:
        manager.set_weights(plan)
        outputs.append(run(unet, make_inputs()))
    base, water, ink, both = seen
    half = base.shape[-1] // 2
    torch.testing.assert_close(both[..., :half], water[..., :half])
    torch.testing.assert_close(both[..., half:], ink[..., half:])
    assert (water - ink).abs().mean() > 1e-2
    for part in (slice(None, half), slice(half, None)):
        assert (both - base)[..., part].abs().max() > 1e-2
        assert (outputs[3] - outputs[0])[..., part].abs().max() > 1e-3
