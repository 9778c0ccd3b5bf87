"""The color judge."""

import argparse

import pytest
import torch
from safetensors.torch import load_file

from research.restune_tiny.icon_sources import PRETRAINING_SETS
from research.restune_tiny.parts.icons import load_icons, on_background
from research.restune_tiny.stages.colours import (
    FLOOR,
    SHADES,
    STEP,
    ColourJudge,
    Colours,
    fit_colour_judge,
    palette,
    train_colours,
    unevenness,
)
from tests.conftest import TINY_BASE


def test_palette_counts_colours_by_nearness():
    picture = torch.zeros(1, 3, 4, 4)
    picture[:, :, 0] = torch.tensor([1.0, 0.5, 0.0])[:, None]  # a quarter of it; on the grid of ninths
    picture[:, 0, 1] = 0.25 / (SHADES - 1)  # another quarter, between two shades
    shares = (palette(picture)[0].square() - FLOOR).view(SHADES, SHADES, SHADES)
    assert float(shares[8, 4, 0]) == pytest.approx(0.25, abs=1e-6)
    assert float(shares[0, 0, 0]) == pytest.approx(0.5 + 0.25 * 0.75, abs=1e-6)
    assert float(shares[1, 0, 0]) == pytest.approx(0.25 * 0.25, abs=1e-6)
    assert float(shares.sum()) == pytest.approx(1, abs=1e-5)


def test_palette_has_the_gradient_of_its_values():
    torch.manual_seed(0)
    pictures = (0.1 + 0.8 * torch.rand(2, 3, 3, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(palette, pictures, eps=1e-7)


def test_unevenness_counts_edges_however_strong():
    pictures = torch.full((4, 3, 8, 8), 0.5)
    pictures[1, :, :, 4:] = 0.9  # an edge
    pictures[2, 1, :, 4:] = 0.5 + STEP  # half of one
    pictures[3, :, ::2] = 0.0  # an edge below each row
    edge = 8 / 56 / 2
    wanted = torch.tensor([0.0, edge * 0.48 / (0.48 + STEP**2), edge / 2, 0.75 / (0.75 + STEP**2) / 2])
    torch.testing.assert_close(unevenness(pictures), wanted)


def test_unevenness_has_the_gradient_of_its_values():
    torch.manual_seed(0)
    pictures = (0.5 + 0.05 * torch.randn(2, 3, 3, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(unevenness, pictures, eps=1e-8, atol=1e-3)


def test_judge_classifies_palettes_of_held_out_images():
    generator = torch.Generator().manual_seed(0)
    styles = torch.arange(100) % len(PRETRAINING_SETS)
    inks = torch.rand(len(PRETRAINING_SETS), 4, 3, generator=generator)
    picks = torch.randint(4, (100, 64), generator=generator)
    pictures = inks[styles[:, None], picks].transpose(1, 2).reshape(100, 3, 8, 8)
    judge = fit_colour_judge(pictures[:50], styles[:50])
    torch.testing.assert_close(judge.uneven[2], unevenness(pictures[:50][styles[:50] == 2]).mean())
    assert torch.equal(judge(pictures[50:]).argmax(1), styles[50:])


def test_judge_of_the_icons_is_written_for_the_stage_that_refines(icons, tmp_path):
    (tmp_path / "vae-normalised").symlink_to(TINY_BASE / "vae")
    train_colours(argparse.Namespace(icons=icons, work=tmp_path, seed=0))
    judge = ColourJudge()
    judge.load_state_dict(load_file(tmp_path / "colours.safetensors"))
    made = load_icons(icons)
    pictures = on_background(made.pixels, torch.ones(len(made.pixels), 3)) / 2 + 0.5
    styles = torch.tensor([PRETRAINING_SETS.index(record["set"]) for record in made.records])
    assert (judge.eval()(pictures).argmax(1) == styles).float().mean() > 0.8

    colours = Colours(tmp_path)
    with torch.no_grad():
        latents = colours.vae.encode(pictures * 2 - 1).latent_dist.mean * colours.vae.config.scaling_factor
        decoded = colours.images(latents)
        alone = colours.excess(decoded[:1], styles[:1])
        assert float(colours.excess(decoded.mean((2, 3), keepdim=True).expand_as(decoded), styles)) == 0
    assert float((decoded - pictures).abs().mean()) < 0.05
    torch.testing.assert_close(alone, (unevenness(decoded[:1]) - judge.uneven[styles[:1]]).clamp(min=0).mean())
