"""Condition images that are made from a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from restune_diffusion import ConditionError
from restune_diffusion.imaging.conditions import (
    MAKERS,
    blur,
    canny,
    condition_to_tensor,
    make_condition,
    mask,
    palette,
)

# What cv2.Canny(pattern, 250, 500) of OpenCV 5.0.0 makes of the pattern below.
OPENCV = [
    "...........#....#..#..#..#.#",
    "..........##...#...#..#..#.#",
    "..........#....#...#..#..#.#",
    ".........##...##..#..#..#..#",
    "........##....#...#..#..#.##",
    ".......##....##...#..#..#.#.",
    "......##.....#...#...###..#.",
    ".....##.....##...#..#..#..#.",
    "....##......#...#...#..#.#..",
    "#####......##...#...#..#.#.#",
    "...#.......#...##..#..#..#..",
    "..........##...#...#..#..#.#",
    ".........##....#...#..#.#..#",
    ".........#....##..#..#..#..#",
    "........##....#...#..#..#.#.",
    ".......##....##..#...#..#.#.",
    "......##.....#...#..#..#..##",
    ".....##..#..##...#..#..#.##.",
    "....##..#..##...#...#..#.#..",
    "...#....#..#....#..#..#..#..",
]


def pattern():
    y, x = np.mgrid[:20, :28]
    channels = [127 + 127 * np.sin(x * x / 40 + y / 3), 127 + 100 * np.cos(y * x / 30), 8 * x + 0 * y]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def edges_of(array, **options):
    return np.asarray(canny(Image.fromarray(array.astype(np.uint8)), **options)) > 0


def test_edges_are_those_of_opencv():
    assert [
        "".join("#" if edge else "." for edge in row) for row in edges_of(np.array(pattern()), low=250, high=500)
    ] == OPENCV


def test_a_square_has_a_closed_outline_one_pixel_wide():
    array = np.zeros((20, 20))
    array[5:15, 5:15] = 255
    edges = edges_of(array)
    inside, outside = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    inside[5:15, 5:15], outside[4:16, 4:16] = True, True
    assert edges.any(axis=0).sum() in (10, 11)
    assert not edges[6:14, 6:14].any()
    assert not edges[~outside].any()
    # one pixel for each row and side, between the corners
    assert (edges[6:14].sum(axis=1) == 2).all()


def test_a_weak_edge_stays_only_where_it_touches_a_strong_one():
    array = np.zeros((30, 30))
    array[:15, 10:] = 100  # a strong step, which goes on as a weak one
    array[15:, 10:] = 40
    lonely = np.zeros((30, 30))
    lonely[:, 10:] = 40
    assert edges_of(array, low=100, high=300)[20:28].sum() == 8
    assert not edges_of(lonely, low=100, high=300).any()
    assert edges_of(lonely, low=100, high=150).sum() == 30
    assert not edges_of(np.full((9, 9), 77)).any()


def test_a_palette_has_the_mean_colour_of_every_cell():
    array = np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    painted = np.asarray(palette(Image.fromarray(array), cells=4)).astype(float)
    for top in range(0, 16, 4):
        for left in range(0, 24, 4):
            cell = painted[top : top + 4, left : left + 4]
            assert (cell == cell[0, 0]).all()
            assert (
                np.abs(cell[0, 0] - array[top : top + 4, left : left + 4].mean((0, 1))).max() <= 1
            )  # Pillow rounds along each axis


def test_a_blur_keeps_the_mean_and_loses_the_detail():
    array = np.zeros((64, 64, 3), np.uint8)
    array[::2, 1::2] = array[1::2, ::2] = 200
    blurred = np.asarray(blur(Image.fromarray(array))).astype(float)
    assert blurred.mean() == pytest.approx(100, abs=1)
    assert blurred[8:-8, 8:-8].std() < 2
    dot = np.zeros((64, 64), np.uint8)
    dot[32, 32] = 255
    # 64 / 16 = 4 pixels of standard deviation: a hundredth of the dot stays in its place
    assert np.asarray(blur(Image.fromarray(dot)))[32, 32, 0] == pytest.approx(255 / (2 * np.pi * 16), abs=1)


def test_a_mask_is_the_alpha_channel_where_there_is_one():
    layer = np.zeros((4, 4, 4), np.uint8)
    layer[1:3, 1:3] = 255
    layer[0, 0, 3] = 127
    found = np.asarray(mask(Image.fromarray(layer)))
    assert (found == np.pad(np.full((2, 2), 255), 1)).all()


def test_a_mask_is_else_what_differs_from_the_background():
    array = np.full((8, 8, 3), (200, 220, 240), np.uint8)
    array[2:5, 3:6] = (200, 220, 200)
    array[0, 0] = (0, 0, 0)
    array[6, 6] = (205, 215, 240)
    expected = np.zeros((8, 8), bool)
    expected[2:5, 3:6] = expected[0, 0] = True
    assert ((np.asarray(mask(Image.fromarray(array))) > 0) == expected).all()


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "I;16", "CMYK", "LA"])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (17, 9)])
def test_every_maker_takes_every_image(name, mode, size):
    made = make_condition(name, Image.new(mode, size))
    assert made.size == size
    assert made.mode in ("RGB", "L")


def test_transparent_pixels_count_as_white():
    layer = Image.new("RGBA", (12, 12), (0, 0, 0, 0))
    assert not np.asarray(canny(layer)).any()
    assert palette(layer).getpixel((0, 0)) == (255, 255, 255)


def test_an_unknown_maker_is_refused_by_name():
    with pytest.raises(ConditionError, match="named 'depth'; choose one of canny, palette, blur, mask"):
        make_condition("depth", pattern())


def test_a_tensor_has_the_channels_that_the_tuner_asks_for():
    image = Image.new("RGBA", (3, 2), (10, 20, 30, 255))
    assert condition_to_tensor(image).tolist() == [[[value] * 3] * 2 for value in (10, 20, 30)]
    assert condition_to_tensor(image, 4)[3].eq(255).all()
    assert condition_to_tensor(image, 1).shape == (1, 2, 3)
    assert condition_to_tensor(image).dtype == torch.uint8
    with pytest.raises(ConditionError, match="has 1, 3 or 4 channels, but the condition needs 7"):
        condition_to_tensor(image, 7)
