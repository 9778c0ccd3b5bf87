"""The distance of drawings from the artist's own pictures."""

import argparse

import pytest
import torch
from diffusers import AutoencoderKL

from tests.conftest import TINY_BASE
from train.pretraining.icons import load_icons, on_background
from train.pretraining.likeness import Likeness, distance, sliced_distance


def test_sliced_distance_compares_sorted_projections():
    torch.manual_seed(0)
    points = torch.randn(2, 3, 50)
    order = torch.randperm(50)
    assert sliced_distance(points[:, :, order], points, 8) < 1e-6
    # On a line every direction is the line itself.
    found, wanted = torch.tensor([[[3.0, 0.0, 1.0]]]), torch.tensor([[[1.0, 5.0, 0.0]]])
    assert float(sliced_distance(found, wanted, 4)) == pytest.approx((0 + 0 + 2) / 3)
    # A shift by (d, 0, 0) moves a projection by d times a coordinate of the direction, on average half of d.
    shift = torch.tensor([0.3, 0.0, 0.0])[:, None]
    assert float(sliced_distance(points + shift, points, 4000)) == pytest.approx(0.15, rel=0.05)


def test_distance_sees_colours_wherever_they_are_and_strokes():
    torch.manual_seed(0)
    picture = torch.full((1, 3, 32, 32), 1.0)
    picture[:, :, 8:16, 8:16] = torch.tensor([-0.5, 0.1, 0.9])[:, None, None]
    moved = torch.roll(picture, (8, 4), (2, 3))
    other = picture.clone()
    other[:, 0, 8:16, 8:16] = 0.5
    scattered = picture.flatten(2)[:, :, torch.randperm(1024)].view_as(picture)  # the same pixels, no shapes
    assert distance(picture, picture) == 0
    assert distance(moved, picture) < 1e-6
    assert distance(other, picture) > 0.01
    assert distance(scattered, picture) > 0.01


@pytest.fixture(scope="module")
def likeness(icons, tmp_path_factory):
    work = tmp_path_factory.mktemp("likeness")
    (work / "vae-normalised").symlink_to(TINY_BASE / "vae")
    return Likeness(argparse.Namespace(icons=icons, work=work))


def test_a_picture_is_nearest_to_itself(icons, likeness):
    pixels = load_icons(icons).pixels
    vae = AutoencoderKL.from_pretrained(TINY_BASE / "vae")
    with torch.no_grad():
        pictures = on_background(pixels, torch.ones(len(pixels), 3))
        latents = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
        torch.manual_seed(0)
        own, turned = torch.arange(20), torch.arange(20).roll(1)
        assert likeness(latents, own) < 0.5 * likeness(latents, turned)


def test_gradient_leads_towards_the_picture_and_leaves_the_decoder_alone(likeness):
    torch.manual_seed(0)
    picks, drawn = torch.arange(4), torch.randn(4, 16, 8, 8).requires_grad_()
    before = likeness(drawn, picks)
    before.backward()
    assert all(parameter.grad is None for parameter in likeness.vae.parameters())
    with torch.no_grad():
        after = likeness(drawn - 3.0 * drawn.grad / drawn.grad.std(), picks)
    assert after < 0.9 * before
