"""The judge of colours."""

import argparse

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY_BASE
from train.prepare_icons import PRETRAINING_SETS
from train.pretraining.colours import FLOOR, SHADES, ColourJudge, fit_colour_judge, palette, train_colours
from train.pretraining.icons import load_icons, on_background


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


def test_judge_tells_palettes_of_pictures_it_has_not_seen():
    generator = torch.Generator().manual_seed(0)
    styles = torch.arange(100) % len(PRETRAINING_SETS)
    inks = torch.rand(len(PRETRAINING_SETS), 4, 3, generator=generator)
    picks = torch.randint(4, (100, 64), generator=generator)
    pictures = inks[styles[:, None], picks].transpose(1, 2).reshape(100, 3, 8, 8)
    judge = fit_colour_judge(pictures[:50], styles[:50])
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
