"""The saved tuners of a folder are found if its runs may be compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from restune_diffusion import SkipConfig, Tuner
from restune_diffusion.storage.tuner_file import save_tuner
from restune_diffusion.training.config.config_file import config_yaml
from restune_diffusion.training.config.train_config import TrainConfig
from restune_diffusion.training.validation.saved_tuners import find_saved_tuners
from restune_diffusion.utils.errors import RestuneError

from ....conftest import make_unet

HELD_OUT: dict[str, object] = {"validation": {"holdout": 2}}


def run_in(folder: Path, **settings: object) -> None:
    output = folder / str(settings["name"])
    output.mkdir(parents=True)
    config = TrainConfig(**{"base": "base", "data": folder / "images", "output": output, **settings})
    (output / "config.yaml").write_text(config_yaml(config))
    config.file.touch()


def test_runs_that_differ_in_what_a_sweep_may_vary_are_found_together(tmp_path):
    for name, rate in (("a", 1e-4), ("b", 1e-3)):
        run_in(tmp_path, name=name, learning_rate=rate, **HELD_OUT)
    assert list(find_saved_tuners(tmp_path).files) == ["a/a.safetensors", "b/b.safetensors"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("validation.holdout", {"validation": {"holdout": 3}}),
        ("validation.holdout_seed", {"validation": {"holdout": 2, "holdout_seed": 7}}),
        ("data", {"data": Path("others")}),
        ("base", {"base": "other"}),
    ],
)
def test_separate_runs_are_not_evaluated_on_the_held_out_images_of_the_first(tmp_path, name, settings):
    run_in(tmp_path, name="a", **HELD_OUT)
    run_in(tmp_path, name="b", **{**HELD_OUT, **settings})
    with pytest.raises(RestuneError, match=f"are not runs of one sweep: they differ in {name}; evaluate the folder"):
        find_saved_tuners(tmp_path)


def test_the_checkpoint_of_the_step_at_which_a_run_stopped_early_is_left_out(tmp_path):
    run_in(tmp_path, name="a", steps=8)
    tuner = Tuner.for_base(make_unet(), SkipConfig(ratio=0.5))
    save_tuner(tuner, tmp_path / "a" / "a.safetensors", training={"steps": 2})
    for step in (1, 2):
        folder = tmp_path / "a" / f"checkpoint-{step:06d}"
        folder.mkdir()
        save_tuner(tuner, folder / "tuner.safetensors")
    found = list(find_saved_tuners(tmp_path / "a").files)
    assert found == ["checkpoint-000001/tuner.safetensors", "a.safetensors"]
