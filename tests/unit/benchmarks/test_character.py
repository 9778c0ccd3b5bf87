import itertools
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from benchmarks.icon_style import character
from benchmarks.icon_style.character import BACKGROUNDS, Pose, background_fidelity, draw, held_out, render, training
from restune_diffusion.data.captions import find_examples

pytest.importorskip("resvg_py")


def pixels(svg):
    return np.asarray(render(svg), dtype=np.float64)


@pytest.fixture(scope="module")
def poses():
    """Return every pose on white, training poses first, so that images differ only by pose."""
    return [pixels(draw(pose, "white")) for _, pose in character._TRAINING + character._HELD_OUT]


def test_there_are_five_training_images_and_ten_held_out_ones():
    assert len(training()) == 5
    assert len(held_out()) == 10
    assert not {picture.background for picture in training()} & {picture.background for picture in held_out()}
    assert {picture.background for picture in training() + held_out()} == set(BACKGROUNDS)


def test_prompts_name_the_creature_and_its_background():
    assert training()[0].prompt == "zorp creature"
    assert training()[4].prompt == "zorp creature on a blue background"
    for picture in held_out():
        assert picture.prompt == f"zorp creature on a {picture.background} background"


def test_images_are_well_formed_svg():
    for picture in training() + held_out():
        root = ElementTree.fromstring(picture.svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("viewBox") == "0 0 64 64"


@pytest.mark.parametrize("size", [64, 96])
def test_rendering_is_deterministic(size):
    svg = training()[1].svg
    first, second = render(svg, size), render(svg, size)
    assert (first.mode, first.size) == ("RGB", (size, size))
    assert first.tobytes() == second.tobytes()


def test_no_background_is_transparent_and_renders_on_white():
    assert "<rect width" not in draw(Pose(), None)
    np.testing.assert_allclose(pixels(draw(Pose(), None)), pixels(draw(Pose(), "white")), atol=3)


def test_every_pose_differs_from_every_other(poses):
    for first, second in itertools.combinations(poses, 2):
        assert np.abs(first - second).mean() > 15


def test_the_creature_is_large_and_clear_of_the_border(poses):
    for picture in poses:
        drawn = (picture < 255).any(axis=-1)
        assert drawn.mean() > 0.25
        assert not drawn[[0, 1, -2, -1]].any()
        assert not drawn[:, [0, 1, -2, -1]].any()


@pytest.mark.parametrize(
    "change", [{"tilt": 10}, {"left_arm": 60}, {"right_arm": 60}, {"gaze": (1, 1)}, {"scale": 0.8}]
)
def test_every_part_of_a_pose_shows(change):
    assert np.abs(pixels(draw(Pose(**change), "white")) - pixels(draw(Pose(), "white"))).max() > 100


def test_mouths_differ():
    drawn = {render(draw(Pose(mouth=mouth), "white")).tobytes() for mouth in ("smile", "grin", "gasp", "smirk")}
    assert len(drawn) == 4


def test_true_images_have_exactly_the_background_of_the_prompt():
    for picture in training() + held_out():
        image = render(picture.svg)
        assert [name for name in BACKGROUNDS if background_fidelity(image, name)] == [picture.background]


@pytest.mark.parametrize("factor", [0.85, 1.1])
@pytest.mark.parametrize("name", BACKGROUNDS)
def test_a_darker_or_lighter_shade_keeps_its_name(name, factor):
    shade = tuple(min(255, round(channel * factor)) for channel in BACKGROUNDS[name])
    assert background_fidelity(Image.new("RGB", (64, 64), shade), name)


def test_a_figure_that_reaches_the_edge_does_not_hide_the_background():
    image = Image.new("RGB", (64, 64), BACKGROUNDS["red"])
    image.paste((18, 181, 172), (0, 20, 64, 44))
    assert background_fidelity(image, "red")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no background `mauve`; choose one of white, black"):
        draw(Pose(), "mauve")
    with pytest.raises(ValueError, match="no background `mauve`"):
        background_fidelity(Image.new("RGB", (8, 8)), "mauve")
    with pytest.raises(ValueError, match="no mouth `frown`; choose one of smile"):
        draw(Pose(mouth="frown"), "white")


def test_training_folder_is_what_restune_reads(tmp_path):
    character.write_training(tmp_path / "zorp")
    examples = find_examples(tmp_path / "zorp")
    assert [example.caption for example in examples] == [picture.prompt for picture in training()]
    for example, picture in zip(examples, training(), strict=True):
        with Image.open(example.path) as image:
            assert image.tobytes() == render(picture.svg).tobytes()
    assert not list((tmp_path / "zorp").glob("*.tmp"))
