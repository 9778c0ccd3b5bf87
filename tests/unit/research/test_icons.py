import torch

from benchmarks.icon_style.character import BACKGROUNDS
from research.restune_tiny.icon_sources import PRETRAINING_SETS
from research.restune_tiny.palette import COLOURS
from research.restune_tiny.parts.icons import load_icons, on_background, shifted, smaller, variants

PALETTE = [torch.tensor(colour) / 127.5 - 1 for colour in COLOURS.values()]


def disc(radius=20):
    """Return an orange disc on a transparent background."""
    side = torch.arange(64) - 31.5
    inside = side[:, None].square() + side[None].square() < radius**2
    return inside[:, :, None] * torch.tensor([240, 120, 30, 255], dtype=torch.uint8)


def test_images_records_and_weights_have_one_order(icons):
    loaded = load_icons(icons)
    assert loaded.pixels.shape == (20, 64, 64, 4)
    assert loaded.pixels.dtype == torch.uint8
    assert [record["set"] for record in loaded.records] == [name for name in PRETRAINING_SETS for _ in range(4)]
    assert loaded.records[6]["style"] == "twemoji style"
    assert loaded.weights.tolist() == [1, 2, 3, 4] * 5
    # The second image of the third set, by its color: see `picture`.
    assert loaded.pixels[9, 33, 29].tolist() == [60, 120, 90, 255]


def test_background_shows_where_the_image_is_transparent():
    rgba = torch.zeros(2, 1, 3, 4, dtype=torch.uint8)
    rgba[:, 0, 0] = torch.tensor([255, 0, 51, 255])
    rgba[:, 0, 1] = torch.tensor([255, 0, 51, 51])
    laid = on_background(rgba, torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.5, 1.0]]))
    assert laid.shape == (2, 3, 1, 3)
    expected = [[[1, -1, -0.6], [1, 0.6, 0.68], [1, 1, 1]], [[1, -1, -0.6], [-0.6, -0.2, 0.68], [-1, 0, 1]]]
    torch.testing.assert_close(laid[:, :, 0].transpose(1, 2), torch.tensor(expected))


def test_shift_moves_down_and_right_and_fills_with_transparency():
    rgba = torch.arange(2 * 9 * 9 * 4).remainder(251).to(torch.uint8).view(2, 9, 9, 4)
    moved = shifted(rgba, 3, -2)
    assert torch.equal(moved[:, 3:, :-2], rgba[:, :-3, 2:])
    assert not moved[:, :3].any()
    assert not moved[:, :, -2:].any()


def test_a_reduced_image_is_in_the_center():
    opaque = torch.full((64, 64, 4), 255, dtype=torch.uint8)
    alpha = smaller(opaque, 52)[..., 3]
    assert (alpha[6:58, 6:58] == 255).all()
    assert int((alpha > 0).sum()) == 52**2


def test_variants_are_original_shifted_smaller_and_on_a_color():
    rgba, seen = disc(), set()
    white = on_background(rgba[None], torch.ones(1, 3))[0]
    for seed in range(60):
        pictures, colours = variants(rgba, torch.Generator().manual_seed(seed))
        assert pictures.shape == (4, 3, 64, 64)
        assert colours[:3] == [0, 0, 0]
        assert torch.equal(pictures[0], white)
        moves = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(pictures[1], torch.roll(white, (dy, dx), (1, 2)))
        ]
        assert len(moves) == 1
        drawn, shrunk = (int((part[2] < 0).sum()) for part in (white, pictures[2]))
        assert (49 / 64) ** 2 < shrunk / drawn < (61 / 64) ** 2
        torch.testing.assert_close(pictures[3][:, 0, 0], PALETTE[colours[3]])
        torch.testing.assert_close(pictures[3][:, 32, 32], white[:, 32, 32])
        seen.add(colours[3])
    assert seen == set(range(1, 12))


def test_benchmark_asks_for_the_colours_that_were_learned():
    assert BACKGROUNDS is COLOURS
    assert next(iter(COLOURS)) == "white"
    assert COLOURS["white"] == (255, 255, 255)
