import argparse
import sys

import numpy as np
import pytest
from PIL import Image

from research.restune_tiny.parts import log
from research.restune_tiny.parts.curve import draw_curve, images_seen, running_mean


def entry(step, loss=0.5, images=8):
    return {"step": step, "loss": loss, "error": 2 * loss, "images_per_step": images}


def write(path, entries):
    for one in entries:
        log.append(path, one)


def settings(tmp_path, stage="unet"):
    return argparse.Namespace(work=tmp_path, out=tmp_path / "curve.png", trained=stage)


def test_resumed_log_keeps_the_last_entry_of_a_step(tmp_path):
    path = tmp_path / "work" / "unet-log.jsonl"
    write(path, [entry(10, 0.9), entry(20, 0.8), entry(30, 0.7)])
    write(path, [entry(20, 0.75), entry(30, 0.65), entry(40, 0.6)])
    assert [(one["step"], one["loss"]) for one in log.read(path)] == [(10, 0.9), (20, 0.75), (30, 0.65), (40, 0.6)]


def test_images_seen_follow_a_change_of_batch():
    entries = [entry(10, images=8), entry(20, images=8), entry(25, images=100)]
    assert images_seen(entries).tolist() == [80, 160, 660]


def test_running_mean_follows_the_start_and_levels_the_end():
    assert running_mean(np.array([4.0, 1, 7, 1, 5, 0]), 2).tolist() == pytest.approx([4, 4, 3.6, 2.8, 3.25, 2])
    assert running_mean(np.array([3.0, 1.0]), 0).tolist() == [3, 1]
    straight = np.arange(9.0)
    np.testing.assert_allclose(running_mean(straight, 3)[:6], straight[:6])


@pytest.mark.parametrize("stage", ["unet", "text", "vae"])
def test_curve_is_an_image(tmp_path, stage):
    pytest.importorskip("matplotlib")
    write(tmp_path / f"{stage}-log.jsonl", [entry(step) | {"l1": 0.2, "match": 3.0} for step in (5, 10, 15)])
    draw_curve(settings(tmp_path, stage))
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > 600
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        draw_curve(settings(tmp_path))


def test_missing_log_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match=r"vae-log\.jsonl to plot; run the stage `vae` first"):
        draw_curve(settings(tmp_path, "vae"))
