import hashlib
import io
import json
import tarfile
from base64 import b64encode

import numpy as np
import pytest
from PIL import Image

from research.restune_tiny import prepare_icons
from research.restune_tiny.icon_sources import Source
from research.restune_tiny.prepare_icons import describe, emoji_names, hex_key, kept, plain, svg, weight_of


@pytest.mark.parametrize(
    "name",
    [
        "flag-france",
        "waving-hand-medium-dark-skin-tone",
        "man-artist-medium-dark",
        "letter-a",
        "keycap-5",
        "7",
        "a-button",
    ],
)
def test_flags_skin_tones_and_letters_are_left_out(name):
    assert not kept(name, {"body": ""})


@pytest.mark.parametrize(
    "name", ["red-heart", "light-bulb", "chequered-flag", "waving-hand", "dark-sunglasses-on-table"]
)
def test_used_icons_are_kept(name):
    assert kept(name, {"body": ""})


def test_hidden_icons_are_left_out():
    assert not kept("red-heart", {"body": "", "hidden": True})


def test_svg_takes_the_icons_own_box_before_the_sets():
    document = svg({"body": "<path/>", "width": 20}, {"width": 32, "height": 32})
    assert 'viewBox="0 0 20 32"' in document


def test_render_is_square_and_keeps_colours_at_soft_edges():
    pytest.importorskip("resvg_py")
    circle = svg({"body": '<circle cx="16" cy="16" r="12" fill="#f00"/>'}, {"width": 32, "height": 32})
    picture = prepare_icons.render(circle, 64)
    assert picture.shape == (64, 64, 4)
    assert picture[0, 0, 3] == 0
    assert picture[32, 32].tolist() == [255, 0, 0, 255]
    edge = picture[(picture[..., 3] > 60) & (picture[..., 3] < 200)]
    assert len(edge)
    assert (edge[:, 0] > 245).all()


def test_rare_families_are_shown_less_often_than_common_things():
    assert weight_of("red apple", 4) > weight_of("man artist", 1)
    assert weight_of("three o'clock", 5) < weight_of("alarm clock", 5)


def test_captions_are_the_unicode_label_the_slug_and_the_everyday_word():
    entries = [{"label": "Automobile", "hexcode": "1F697-FE0F", "tags": ["driving", "red heart"], "group": 5}]
    icon = describe("red-car", emoji_names([*entries, {"label": "red heart", "hexcode": "2764"}])[hex_key("1f697")])
    assert icon.captions == ["automobile", "red car", "car"]
    assert icon.tags == ["driving"]


def test_plain_words():
    assert plain("Three O’Clock: late_night") == "three o'clock late night"


def make_tarball(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def test_a_changed_tarball_is_refused(tmp_path):
    path = tmp_path / "icons.tgz"
    make_tarball(path, {"icons.json": {}})
    with pytest.raises(ValueError, match="sha512"):
        prepare_icons.checked_bytes(path, Source("icons", "1.0.0", "AAAA", "MIT"))


def test_set_round_trip(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    square = '<path fill="#0f0" d="M0 0h8v8H0z"/>'
    content = {"icons": {"green-square": {"body": square}, "flag-x": {"body": ""}}, "width": 8, "height": 8}
    source = Source("icons", "1.0.0", "", "MIT", "test style")
    digest = make_tarball(tmp_path / source.tarball, {"icons.json": content, "chars.json": {}})
    monkeypatch.setitem(prepare_icons.SOURCES, "tiny", Source("icons", "1.0.0", digest, "MIT", "test style"))
    pictures, icons = prepare_icons.render_set("tiny", tmp_path, {}, 16)
    prepare_icons.write_set(tmp_path / "out", "tiny", pictures, icons)
    read = np.load(tmp_path / "out" / "tiny.npy", allow_pickle=False)
    about = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert read.shape == (1, 16, 16, 4)
    assert read[0, 8, 8].tolist() == [0, 255, 0, 255]
    assert about["style"] == "test style"
    assert [icon["name"] for icon in about["icons"]] == ["green-square"]


def test_the_demo_set_is_complete_and_licensed():
    demo = prepare_icons.Path(__file__).parents[3] / "restune_diffusion" / "assets" / "demo"
    lines = [json.loads(line) for line in (demo / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    assert all(Image.open(demo / line["file_name"]).size == (64, 64) for line in lines)
    assert all(line["text"].endswith(", ink style") for line in lines)
    assert "Microsoft" in (demo / "LICENSE").read_text()
